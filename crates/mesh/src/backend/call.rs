//! What a collective is called, for comparison between ranks and for error messages.

use crate::{DType, GroupRank};

/// Name of a collective as the user called it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum CallName {
    Barrier,
    Broadcast,
    AllReduce,
    AllGather,
    ReduceScatter,
    AllToAll,
    AllToAllUneven,
    AllGatherObject,
    GatherObject,
    ScatterObject,
    BroadcastObject,
    Subgroups,
    Reduce,
    Gather,
    Scatter,
    SendRecv,
}

impl CallName {
    /// Every name at the index of its discriminant.
    const ALL: [CallName; 16] = [
        CallName::Barrier,
        CallName::Broadcast,
        CallName::AllReduce,
        CallName::AllGather,
        CallName::ReduceScatter,
        CallName::AllToAll,
        CallName::AllToAllUneven,
        CallName::AllGatherObject,
        CallName::GatherObject,
        CallName::ScatterObject,
        CallName::BroadcastObject,
        CallName::Subgroups,
        CallName::Reduce,
        CallName::Gather,
        CallName::Scatter,
        CallName::SendRecv,
    ];

    /// The method's name.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            CallName::Barrier => "barrier",
            CallName::Broadcast => "broadcast",
            CallName::AllReduce => "all_reduce",
            CallName::AllGather => "all_gather",
            CallName::ReduceScatter => "reduce_scatter",
            CallName::AllToAll => "all_to_all",
            CallName::AllToAllUneven => "all_to_all_uneven",
            CallName::AllGatherObject => "all_gather_object",
            CallName::GatherObject => "gather_object",
            CallName::ScatterObject => "scatter_object",
            CallName::BroadcastObject => "broadcast_object",
            CallName::Subgroups => "subgroups",
            CallName::Reduce => "reduce",
            CallName::Gather => "gather",
            CallName::Scatter => "scatter",
            CallName::SendRecv => "send_recv",
        }
    }

    /// The name whose discriminant is `code`.
    pub(crate) fn from_code(code: u64) -> Option<CallName> {
        Self::ALL.get(usize::try_from(code).ok()?).copied()
    }
}

/// A collective's name, the dtype of its elements, and its root if it has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) name: CallName,
    pub(crate) dtype: DType,
    pub(crate) root: Option<GroupRank>,
}

impl Call {
    /// A call without a root.
    pub(crate) const fn new(name: CallName, dtype: DType) -> Self {
        Call { name, dtype, root: None }
    }

    pub(crate) const fn rooted(name: CallName, dtype: DType, root: GroupRank) -> Self {
        Call { name, dtype, root: Some(root) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_lies_at_its_code() {
        for (code, name) in CallName::ALL.iter().enumerate() {
            assert_eq!(*name as usize, code);
            assert_eq!(CallName::from_code(code as u64), Some(*name));
        }
        assert_eq!(CallName::from_code(16), None);
    }
}
