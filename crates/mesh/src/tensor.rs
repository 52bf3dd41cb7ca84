//! Bridges to candle: dtypes, and the bytes of a CPU storage. No communication.

use bytemuck::{cast_slice, cast_slice_mut};
use candle_core::{CpuStorage, DType as CandleDType};

use crate::{DType, Error, Result};

impl TryFrom<CandleDType> for DType {
    type Error = Error;

    /// # Errors
    /// `InvalidArgument` for candle's 8, 6 and 4 bit floats, which no collective carries.
    fn try_from(dtype: CandleDType) -> Result<DType> {
        match dtype {
            CandleDType::U8 => Ok(DType::U8),
            CandleDType::U32 => Ok(DType::U32),
            CandleDType::I16 => Ok(DType::I16),
            CandleDType::I32 => Ok(DType::I32),
            CandleDType::I64 => Ok(DType::I64),
            CandleDType::BF16 => Ok(DType::BF16),
            CandleDType::F16 => Ok(DType::F16),
            CandleDType::F32 => Ok(DType::F32),
            CandleDType::F64 => Ok(DType::F64),
            other => Err(unsupported("a dtype that collectives carry", other.as_str())),
        }
    }
}

impl TryFrom<DType> for CandleDType {
    type Error = Error;

    /// # Errors
    /// `InvalidArgument` for what candle does not have (i8, bool, …), and its 8 bit floats.
    fn try_from(dtype: DType) -> Result<CandleDType> {
        match dtype {
            DType::U8 => Ok(CandleDType::U8),
            DType::I16 => Ok(CandleDType::I16),
            DType::I32 => Ok(CandleDType::I32),
            DType::I64 => Ok(CandleDType::I64),
            DType::U32 => Ok(CandleDType::U32),
            DType::F16 => Ok(CandleDType::F16),
            DType::BF16 => Ok(CandleDType::BF16),
            DType::F32 => Ok(CandleDType::F32),
            DType::F64 => Ok(CandleDType::F64),
            other => Err(unsupported("a dtype of candle", other.name())),
        }
    }
}

/// The bytes of a whole storage, in native byte order; offsets and strides of a tensor are the caller's.
///
/// # Errors
/// `InvalidArgument` for candle's 8, 6 and 4 bit floats.
pub fn cpu_bytes(storage: &CpuStorage) -> Result<&[u8]> {
    match storage {
        CpuStorage::U8(values) => Ok(values),
        CpuStorage::U32(values) => Ok(cast_slice(values)),
        CpuStorage::I16(values) => Ok(cast_slice(values)),
        CpuStorage::I32(values) => Ok(cast_slice(values)),
        CpuStorage::I64(values) => Ok(cast_slice(values)),
        CpuStorage::BF16(values) => Ok(cast_slice(values)),
        CpuStorage::F16(values) => Ok(cast_slice(values)),
        CpuStorage::F32(values) => Ok(cast_slice(values)),
        CpuStorage::F64(values) => Ok(cast_slice(values)),
        CpuStorage::F8E4M3(_) => Err(no_bytes("f8e4m3")),
        CpuStorage::F6E2M3(_) => Err(no_bytes("f6e2m3")),
        CpuStorage::F6E3M2(_) => Err(no_bytes("f6e3m2")),
        CpuStorage::F4(_) => Err(no_bytes("f4")),
        CpuStorage::F8E8M0(_) => Err(no_bytes("f8e8m0")),
    }
}

/// [`cpu_bytes`], to be written.
///
/// # Errors
/// `InvalidArgument` for candle's 8, 6 and 4 bit floats.
pub fn cpu_bytes_mut(storage: &mut CpuStorage) -> Result<&mut [u8]> {
    match storage {
        CpuStorage::U8(values) => Ok(values),
        CpuStorage::U32(values) => Ok(cast_slice_mut(values)),
        CpuStorage::I16(values) => Ok(cast_slice_mut(values)),
        CpuStorage::I32(values) => Ok(cast_slice_mut(values)),
        CpuStorage::I64(values) => Ok(cast_slice_mut(values)),
        CpuStorage::BF16(values) => Ok(cast_slice_mut(values)),
        CpuStorage::F16(values) => Ok(cast_slice_mut(values)),
        CpuStorage::F32(values) => Ok(cast_slice_mut(values)),
        CpuStorage::F64(values) => Ok(cast_slice_mut(values)),
        CpuStorage::F8E4M3(_) => Err(no_bytes("f8e4m3")),
        CpuStorage::F6E2M3(_) => Err(no_bytes("f6e2m3")),
        CpuStorage::F6E3M2(_) => Err(no_bytes("f6e3m2")),
        CpuStorage::F4(_) => Err(no_bytes("f4")),
        CpuStorage::F8E8M0(_) => Err(no_bytes("f8e8m0")),
    }
}

fn no_bytes(got: &str) -> Error {
    unsupported("a storage of a dtype that collectives carry", got)
}

fn unsupported(expected: &str, got: &str) -> Error {
    Error::InvalidArgument {
        op: "conversion",
        what: "dtype".into(),
        expected: expected.into(),
        got: got.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtypes_of_both_sides_convert_there_and_back() {
        for dtype in DType::ELEMENTS.into_iter().filter(|dtype| *dtype != DType::I8) {
            let candle = CandleDType::try_from(dtype).unwrap();
            assert_eq!(DType::try_from(candle), Ok(dtype));
            assert_eq!(candle.size_in_bytes(), dtype.size_bytes());
        }
        assert!(CandleDType::try_from(DType::I8).is_err());
        assert!(DType::try_from(CandleDType::F8E4M3).is_err());
    }

    #[test]
    fn bytes_of_a_storage_are_its_values() {
        let mut storage = CpuStorage::F32(vec![1.0, 2.0]);
        cpu_bytes_mut(&mut storage).unwrap()[4..].copy_from_slice(&3.0f32.to_ne_bytes());
        assert_eq!(cpu_bytes(&storage), Ok(bytemuck::cast_slice(&[1.0f32, 3.0])));
        assert!(cpu_bytes(&CpuStorage::F4(vec![0])).is_err());
    }
}
