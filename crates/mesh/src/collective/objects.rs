//! Collectives of objects: bytes of any length, which differs from rank to rank.
//!
//! Each moves the lengths first and the bytes next: two collectives, of which the second moves only what its
//! receivers take.

use super::check::in_group;
use crate::backend::pieces::offsets;
use crate::backend::{Call, CallName};
use crate::{DType, Error, GroupRank, ProcessGroup, Result};

impl ProcessGroup {
    /// Gathers one object of each rank, in group-rank order, on all ranks.
    ///
    /// # Source
    /// `torch.distributed.all_gather_object`, of bytes.
    pub fn all_gather_object(&self, object: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.exchange_objects(CallName::AllGatherObject, object)
    }

    /// Gathers one object of each rank on `root`, in group-rank order; `None` on other ranks.
    ///
    /// # Errors
    /// `InvalidArgument` if the group has no rank `root`.
    ///
    /// # Source
    /// `torch.distributed.gather_object`, of bytes; `root` is a group rank.
    pub fn gather_object(&self, object: &[u8], root: GroupRank) -> Result<Option<Vec<Vec<u8>>>> {
        in_group("gather_object", root, self.size())?;
        let is_root = self.group_rank() == root;
        let lens =
            self.exchange_lens(Call::rooted(CallName::GatherObject, DType::I64, root), object.len())?;
        let receive = if is_root { lens } else { vec![0; self.size()] };
        let send: Vec<usize> = (0..self.size()).map(|g| if g == root.0 { object.len() } else { 0 }).collect();
        let objects = self.exchange_parts(CallName::GatherObject, object, &send, &receive)?;
        Ok(is_root.then_some(objects))
    }

    /// Gives each rank its object from the list of `root`, one a rank.
    ///
    /// # Errors
    /// `InvalidArgument` if the group has no rank `root`, or `objects` is not, on `root`, a list with one object a
    /// rank. Other ranks' lists are ignored.
    ///
    /// # Source
    /// `torch.distributed.scatter_object_list`, of bytes; `root` is a group rank.
    pub fn scatter_object(&self, objects: Option<&[Vec<u8>]>, root: GroupRank) -> Result<Vec<u8>> {
        const NAME: CallName = CallName::ScatterObject;
        in_group("scatter_object", root, self.size())?;
        let objects = if self.group_rank() == root { self.root_objects(objects)? } else { &[] };
        let mut lens = vec![0i64; self.size()];
        lens.iter_mut().zip(objects).for_each(|(len, object)| *len = object.len() as i64);
        self.backend()?.broadcast(
            Call::rooted(NAME, DType::I64, root),
            bytemuck::cast_slice_mut(&mut lens),
            root,
        )?;

        let zeros = vec![0; self.size()];
        let send = if objects.is_empty() { zeros.clone() } else { objects.iter().map(Vec::len).collect() };
        let mut receive = zeros;
        receive[root.0] = lens[self.group_rank().0] as usize;
        let mut parts = self.exchange_parts(NAME, &objects.concat(), &send, &receive)?;
        Ok(parts.swap_remove(root.0))
    }

    /// Gives the object of `root` to all ranks. Other ranks' objects are ignored.
    ///
    /// # Errors
    /// `InvalidArgument` if the group has no rank `root`, or `object` is `None` on `root`.
    ///
    /// # Source
    /// `torch.distributed.broadcast_object_list`, of bytes; `root` is a group rank.
    pub fn broadcast_object(&self, object: Option<&[u8]>, root: GroupRank) -> Result<Vec<u8>> {
        const NAME: CallName = CallName::BroadcastObject;
        in_group("broadcast_object", root, self.size())?;
        let is_root = self.group_rank() == root;
        if is_root && object.is_none() {
            return Err(absent("broadcast_object", "an object on root"));
        }
        let mut object = object.filter(|_| is_root).map_or(Vec::new(), <[u8]>::to_vec);
        let mut len = [object.len() as i64];
        self.backend()?.broadcast(
            Call::rooted(NAME, DType::I64, root),
            bytemuck::cast_slice_mut(&mut len),
            root,
        )?;
        object.resize(len[0] as usize, 0);
        self.backend()?.broadcast(Call::rooted(NAME, DType::U8, root), &mut object, root)?;
        Ok(object)
    }

    /// [`ProcessGroup::all_gather_object`] under the name of the call that needs it.
    pub(crate) fn exchange_objects(&self, name: CallName, object: &[u8]) -> Result<Vec<Vec<u8>>> {
        let lens = self.exchange_lens(Call::new(name, DType::I64), object.len())?;
        let mut objects: Vec<Vec<u8>> = lens.iter().map(|len| vec![0; *len]).collect();
        let mut output: Vec<&mut [u8]> = objects.iter_mut().map(Vec::as_mut_slice).collect();
        self.backend()?.all_gather(Call::new(name, DType::U8), object, &lens, &mut output)?;
        Ok(objects)
    }

    fn exchange_lens(&self, call: Call, len: usize) -> Result<Vec<usize>> {
        let mut lens = vec![0i64; self.size()];
        let (input, counts) = ([len as i64], vec![8; self.size()]);
        let output = &mut [bytemuck::cast_slice_mut(&mut lens)];
        self.backend()?.all_gather(call, bytemuck::cast_slice(&input), &counts, output)?;
        Ok(lens.into_iter().map(|len| len as usize).collect())
    }

    /// An uneven all_to_all of bytes, returned as one vector for each sender.
    fn exchange_parts(
        &self,
        name: CallName,
        input: &[u8],
        send: &[usize],
        receive: &[usize],
    ) -> Result<Vec<Vec<u8>>> {
        let mut output = vec![0; receive.iter().sum()];
        self.backend()?.all_to_all(Call::new(name, DType::U8), input, send, &mut output, receive)?;
        let parts = offsets(receive).into_iter().zip(receive);
        Ok(parts.map(|(offset, len)| output[offset..offset + len].to_vec()).collect())
    }

    fn root_objects<'a>(&self, objects: Option<&'a [Vec<u8>]>) -> Result<&'a [Vec<u8>]> {
        const OP: &str = "scatter_object";
        let objects = objects.ok_or_else(|| absent(OP, "a list on root"))?;
        super::check::n_counts(OP, "number of objects", self.size(), objects.len())?;
        Ok(objects)
    }
}

fn absent(op: &'static str, expected: &str) -> Error {
    Error::InvalidArgument { op, what: "object".into(), expected: expected.into(), got: "none".into() }
}
