//! What ranks remember of their last save, so that the next of the same layout sends only what changed.

use crate::Result;
use crate::coordinate::{Message, protocol};
use crate::plan::{GlobalPlan, SavePlan, WritePlan};
use crate::tree::Node;

/// One rank's memory of its last save. Every rank of a group has one or none has.
#[derive(Default)]
pub(crate) struct SaveCache {
    /// What this rank offered last, and was told to write.
    last: Option<(SavePlan, WritePlan)>,
    /// On the coordinator.
    global: Option<Remembered>,
}

/// The coordinator's memory.
struct Remembered {
    plans: Vec<SavePlan>,
    global: GlobalPlan,
}

/// What a rank sends of its plan.
pub(crate) enum Offer {
    Whole(SavePlan),
    /// Boxes and nesting as last time; the plain values in order.
    Same(Vec<Node>),
}

/// What the coordinator sends of a rank's part; `None` as last time.
pub(crate) type Reply = Option<WritePlan>;

const WHOLE: u8 = 0;
const SAME: u8 = 1;

impl Message for Offer {
    fn encode(&self) -> Result<Vec<u8>> {
        let (kind, mut bytes) = match self {
            Offer::Whole(plan) => (WHOLE, plan.encode()?),
            Offer::Same(values) => (SAME, values.encode()?),
        };
        bytes.push(kind);
        Ok(bytes)
    }

    fn decode(bytes: &[u8]) -> Result<Self> {
        match bytes.split_last() {
            Some((&WHOLE, plan)) => SavePlan::decode(plan).map(Offer::Whole),
            Some((&SAME, values)) => Message::decode(values).map(Offer::Same),
            _ => Err(protocol("an offer of another kind")),
        }
    }
}

impl SaveCache {
    /// What this rank sends.
    pub(crate) fn offer(&self, plan: &SavePlan) -> Offer {
        let last = self.last.as_ref().map(|(last, _)| last);
        let is_same =
            last.is_some_and(|last| last.tensors == plan.tensors && last.tree.has_nesting_of(&plan.tree));
        if is_same { Offer::Same(plan.tree.plain_leaves()) } else { Offer::Whole(plan.clone()) }
    }

    /// The coordinator's plan: `make` makes it, unless every rank offers what it offered last time.
    pub(crate) fn global(
        &mut self,
        offers: Vec<Offer>,
        make: impl FnOnce(Vec<SavePlan>) -> Result<GlobalPlan>,
    ) -> Result<(GlobalPlan, bool)> {
        let is_same = offers.iter().all(|offer| matches!(offer, Offer::Same(_)));
        let known = self.global.take();
        let mut last = known.as_ref().map(|known| known.plans.as_slice()).unwrap_or_default().iter();
        let plan = |offer| match (offer, last.next()) {
            (Offer::Whole(plan), _) => Ok(plan),
            (Offer::Same(values), Some(plan)) => {
                let tree =
                    plan.tree.with_plain_leaves(values).ok_or_else(|| protocol("values of another tree"))?;
                let tensors = if is_same { Vec::new() } else { plan.tensors.clone() };
                Ok(SavePlan { tree, tensors })
            }
            (Offer::Same(_), None) => Err(protocol("a plan as one that never was")),
        };
        let plans = offers.into_iter().map(plan).collect::<Result<Vec<_>>>()?;
        let Some(Remembered { plans: whole, mut global }) = known.filter(|_| is_same) else {
            let global = make(plans.clone())?;
            self.global = Some(Remembered { plans, global: global.clone() });
            return Ok((global, false));
        };
        global.layout.tree = merged(plans)?;
        self.global = Some(Remembered { plans: whole, global: global.clone() });
        Ok((global, true))
    }

    /// This rank's part, as the coordinator replied to `plan`.
    pub(crate) fn accept(&mut self, plan: SavePlan, reply: Reply) -> Result<WritePlan> {
        let write = match (reply, self.last.take()) {
            (Some(write), _) | (None, Some((_, write))) => write,
            (None, None) => return Err(protocol("a part as one that never was")),
        };
        self.last = Some((plan, write.clone()));
        Ok(write)
    }

    /// Forgets everything, after a save of which it is not known how far it came.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// The trees of all ranks in one.
pub(crate) fn merged(plans: Vec<SavePlan>) -> Result<Node> {
    let mut trees = plans.into_iter().map(|plan| plan.tree);
    trees.try_fold(Node::Map(Vec::new()), |all, tree| all.merge(tree, ""))
}
