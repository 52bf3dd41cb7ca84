//! The collectives of conformance cases at a place: on slices of host memory as they are, or through memory of a CUDA device
//! that holds the same values.

use sconce_mesh::{CudaBackend, DType, Element, GroupRank, ProcessGroup, ReduceOp, Result};

use crate::Place;

/// A group whose collectives go by way of a place's device.
pub(super) struct Carried<'c> {
    pub(super) group: &'c ProcessGroup,
    pub(super) place: &'c Place,
}

/// Whether elements of this type go by way of a CUDA device: candle has no i8.
fn is_on_cuda<T: Element>(place: &Place) -> bool {
    place.cuda.is_some() && T::DTYPE != DType::I8
}

/// As [`is_on_cuda`], for reductions: NCCL has none of i16.
fn reduces_on_cuda<T: Element>(place: &Place) -> bool {
    is_on_cuda::<T>(place) && !(place.cuda == Some(CudaBackend::Nccl) && T::DTYPE == DType::I16)
}

impl Carried<'_> {
    /// NCCL multiplies by the reciprocal before it adds, so that averages of three are not the oracle's to the last bit.
    pub(super) fn exact(&self, op: ReduceOp) -> ReduceOp {
        let rounds = self.place.cuda == Some(CudaBackend::Nccl) && !self.group.size().is_power_of_two();
        if rounds && op == ReduceOp::Avg { ReduceOp::Sum } else { op }
    }

    pub(super) fn all_reduce<T: Element>(&self, buffer: &mut [T], op: ReduceOp) -> Result<()> {
        match reduces_on_cuda::<T>(self.place) {
            true => device::all_reduce(self, buffer, op),
            false => self.group.all_reduce(buffer, op),
        }
    }

    pub(super) fn broadcast<T: Element>(&self, buffer: &mut [T], root: GroupRank) -> Result<()> {
        match is_on_cuda::<T>(self.place) {
            true => device::broadcast(self, buffer, root),
            false => self.group.broadcast(buffer, root),
        }
    }

    pub(super) fn all_gather<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        match is_on_cuda::<T>(self.place) {
            true => device::all_gather(self, input, output),
            false => self.group.all_gather_into(input, output),
        }
    }

    pub(super) fn all_gather_uneven<T: Element>(
        &self,
        input: &[T],
        counts: &[usize],
        output: &mut [T],
    ) -> Result<()> {
        match is_on_cuda::<T>(self.place) {
            true => device::all_gather_uneven(self, input, counts, output),
            false => self.group.all_gather_uneven(input, counts, output),
        }
    }

    pub(super) fn reduce_scatter<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        op: ReduceOp,
    ) -> Result<()> {
        match reduces_on_cuda::<T>(self.place) {
            true => device::reduce_scatter(self, input, output, op),
            false => self.group.reduce_scatter(input, output, op),
        }
    }

    pub(super) fn reduce_scatter_uneven<T: Element>(
        &self,
        input: &[T],
        counts: &[usize],
        output: &mut [T],
        op: ReduceOp,
    ) -> Result<()> {
        match reduces_on_cuda::<T>(self.place) {
            true => device::reduce_scatter_uneven(self, input, counts, output, op),
            false => self.group.reduce_scatter_uneven(input, counts, output, op),
        }
    }

    pub(super) fn all_to_all<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        match is_on_cuda::<T>(self.place) {
            true => device::all_to_all(self, input, output),
            false => self.group.all_to_all(input, output),
        }
    }

    pub(super) fn all_to_all_uneven<T: Element>(
        &self,
        input: &[T],
        send: &[usize],
        output: &mut [T],
        receive: &[usize],
    ) -> Result<()> {
        match is_on_cuda::<T>(self.place) {
            true => device::all_to_all_uneven(self, input, send, output, receive),
            false => self.group.all_to_all_uneven(input, send, output, receive),
        }
    }
}

/// A build without CUDA has no place on a CUDA device.
#[cfg(not(feature = "cuda"))]
mod device {
    use super::*;

    macro_rules! absent {
        ($($name:ident($($argument:ident: $type:ty),*));* $(;)?) => {$(
            pub(super) fn $name<T: Element>(_: &Carried<'_>, $($argument: $type),*) -> Result<()> {
                let _ = ($($argument),*,);
                unreachable!("Place::cuda panics in this build")
            }
        )*};
    }

    absent! {
        all_reduce(buffer: &mut [T], op: ReduceOp);
        broadcast(buffer: &mut [T], root: GroupRank);
        all_gather(input: &[T], output: &mut [T]);
        all_gather_uneven(input: &[T], counts: &[usize], output: &mut [T]);
        reduce_scatter(input: &[T], output: &mut [T], op: ReduceOp);
        reduce_scatter_uneven(input: &[T], counts: &[usize], output: &mut [T], op: ReduceOp);
        all_to_all(input: &[T], output: &mut [T]);
        all_to_all_uneven(input: &[T], send: &[usize], output: &mut [T], receive: &[usize]);
    }
}

#[cfg(feature = "cuda")]
mod device {
    use candle_core::{CudaDevice, CudaStorage, Device, Layout};
    use sconce_mesh::cuda::{CudaBytes, CudaBytesMut, read_chunks, uninit, write_chunks};

    use super::*;

    /// Device memory with the values of a slice.
    struct Held {
        storage: CudaStorage,
        layout: Layout,
    }

    impl Held {
        fn of<T: Element>(place: &Place, values: &[T]) -> Result<Held> {
            let mut held = Held {
                storage: uninit(device_of(place), T::DTYPE, values.len())?,
                layout: Layout::contiguous(values.len()),
            };
            let bytes: &[u8] = bytemuck::cast_slice(values);
            write_chunks(&mut held.bytes_mut()?, |at, chunk| {
                let end = at + chunk.len();
                chunk.copy_from_slice(&bytes[at..end]);
            })?;
            Ok(held)
        }

        fn bytes(&self) -> Result<CudaBytes<'_>> {
            CudaBytes::of(&self.storage, &self.layout)
        }

        fn bytes_mut(&mut self) -> Result<CudaBytesMut<'_>> {
            CudaBytesMut::of(&mut self.storage, &self.layout)
        }

        fn take<T: Element>(self, values: &mut [T]) -> Result<()> {
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
            read_chunks(&self.bytes()?, |at, chunk| bytes[at..at + chunk.len()].copy_from_slice(chunk))
        }
    }

    fn device_of(place: &Place) -> &CudaDevice {
        let Device::Cuda(device) = &place.device else { panic!("the place is no CUDA device") };
        device
    }

    pub(super) fn all_reduce<T: Element>(c: &Carried<'_>, buffer: &mut [T], op: ReduceOp) -> Result<()> {
        let mut held = Held::of(c.place, buffer)?;
        c.group.cuda_all_reduce(&mut held.bytes_mut()?, op)?;
        held.take(buffer)
    }

    pub(super) fn broadcast<T: Element>(c: &Carried<'_>, buffer: &mut [T], root: GroupRank) -> Result<()> {
        let mut held = Held::of(c.place, buffer)?;
        c.group.cuda_broadcast(&mut held.bytes_mut()?, root)?;
        held.take(buffer)
    }

    /// In two pieces.
    pub(super) fn all_gather<T: Element>(c: &Carried<'_>, input: &[T], output: &mut [T]) -> Result<()> {
        let input = Held::of(c.place, input)?;
        let (first, second) = output.split_at_mut(output.len() / 3);
        let (mut one, mut two) = (Held::of(c.place, first)?, Held::of(c.place, second)?);
        c.group.cuda_all_gather(&input.bytes()?, &mut [one.bytes_mut()?, two.bytes_mut()?])?;
        one.take(first)?;
        two.take(second)
    }

    pub(super) fn all_gather_uneven<T: Element>(
        c: &Carried<'_>,
        input: &[T],
        counts: &[usize],
        output: &mut [T],
    ) -> Result<()> {
        let (input, mut held) = (Held::of(c.place, input)?, Held::of(c.place, output)?);
        c.group.cuda_all_gather_uneven(&input.bytes()?, counts, &mut held.bytes_mut()?)?;
        held.take(output)
    }

    /// In two pieces.
    pub(super) fn reduce_scatter<T: Element>(
        c: &Carried<'_>,
        input: &[T],
        output: &mut [T],
        op: ReduceOp,
    ) -> Result<()> {
        let (first, second) = input.split_at(input.len() / 3);
        let (one, two) = (Held::of(c.place, first)?, Held::of(c.place, second)?);
        let mut held = Held::of(c.place, output)?;
        c.group.cuda_reduce_scatter(&[one.bytes()?, two.bytes()?], &mut held.bytes_mut()?, op)?;
        held.take(output)
    }

    pub(super) fn reduce_scatter_uneven<T: Element>(
        c: &Carried<'_>,
        input: &[T],
        counts: &[usize],
        output: &mut [T],
        op: ReduceOp,
    ) -> Result<()> {
        let (input, mut held) = (Held::of(c.place, input)?, Held::of(c.place, output)?);
        c.group.cuda_reduce_scatter_uneven(&input.bytes()?, counts, &mut held.bytes_mut()?, op)?;
        held.take(output)
    }

    pub(super) fn all_to_all<T: Element>(c: &Carried<'_>, input: &[T], output: &mut [T]) -> Result<()> {
        let (input, mut held) = (Held::of(c.place, input)?, Held::of(c.place, output)?);
        c.group.cuda_all_to_all(&input.bytes()?, &mut held.bytes_mut()?)?;
        held.take(output)
    }

    pub(super) fn all_to_all_uneven<T: Element>(
        c: &Carried<'_>,
        input: &[T],
        send: &[usize],
        output: &mut [T],
        receive: &[usize],
    ) -> Result<()> {
        let (input, mut held) = (Held::of(c.place, input)?, Held::of(c.place, output)?);
        c.group.cuda_all_to_all_uneven(&input.bytes()?, send, &mut held.bytes_mut()?, receive)?;
        held.take(output)
    }
}
