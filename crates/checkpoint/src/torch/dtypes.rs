//! torch's dtypes, by the names and storage classes that its pickles use.

use sconce_dtensor::DType;

/// A dtype of torch, whether we can hold it or not: position in [`DTYPES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TorchDType(u8);

struct Row {
    name: &'static str,
    /// The storage class of that dtype; empty for dtypes that came after those classes.
    storage: &'static str,
    ours: Option<DType>,
}

const fn row(name: &'static str, storage: &'static str, ours: Option<DType>) -> Row {
    Row { name, storage, ours }
}

const DTYPES: [Row; 41] = [
    row("float32", "FloatStorage", Some(DType::F32)),
    row("float64", "DoubleStorage", Some(DType::F64)),
    row("float16", "HalfStorage", Some(DType::F16)),
    row("bfloat16", "BFloat16Storage", Some(DType::BF16)),
    row("int64", "LongStorage", Some(DType::I64)),
    row("int32", "IntStorage", Some(DType::I32)),
    row("int16", "ShortStorage", Some(DType::I16)),
    row("int8", "CharStorage", Some(DType::I8)),
    row("uint8", "ByteStorage", Some(DType::U8)),
    row("bool", "BoolStorage", Some(DType::Bool)),
    row("complex64", "ComplexFloatStorage", Some(DType::C64)),
    row("uint16", "", Some(DType::U16)),
    row("uint32", "", Some(DType::U32)),
    row("uint64", "", Some(DType::U64)),
    row("float8_e4m3fn", "", Some(DType::F8E4M3)),
    row("float8_e5m2", "", Some(DType::F8E5M2)),
    row("float8_e8m0fnu", "", Some(DType::F8E8M0)),
    row("float8_e4m3fnuz", "", Some(DType::F8E4M3Fnuz)),
    row("float8_e5m2fnuz", "", Some(DType::F8E5M2Fnuz)),
    row("complex128", "ComplexDoubleStorage", None),
    row("complex32", "", None),
    row("float4_e2m1fn_x2", "", None),
    row("bcomplex32", "", None),
    row("quint8", "QUInt8Storage", None),
    row("qint8", "QInt8Storage", None),
    row("qint32", "QInt32Storage", None),
    row("quint4x2", "QUInt4x2Storage", None),
    row("quint2x4", "QUInt2x4Storage", None),
    row("bits8", "", None),
    row("bits16", "", None),
    row("bits1x8", "", None),
    row("bits2x4", "", None),
    row("bits4x2", "", None),
    row("uint1", "", None),
    row("uint2", "", None),
    row("uint3", "", None),
    row("uint4", "", None),
    row("uint5", "", None),
    row("uint6", "", None),
    row("uint7", "", None),
    row("int4", "", None),
];

impl TorchDType {
    /// `float32` of `torch.float32`.
    pub(super) fn by_name(name: &str) -> Option<Self> {
        Self::find(|row| row.name == name)
    }

    /// `FloatStorage` of `torch.FloatStorage`.
    pub(super) fn by_storage(name: &str) -> Option<Self> {
        Self::find(|row| !row.storage.is_empty() && row.storage == name)
    }

    /// Torch's dtype for one of ours.
    pub(super) fn of(dtype: DType) -> Self {
        Self::find(|row| row.ours == Some(dtype)).unwrap_or(TorchDType(0))
    }

    pub(super) fn name(self) -> &'static str {
        DTYPES[self.0 as usize].name
    }

    /// The storage class; empty for dtypes whose storages are untyped.
    pub(super) fn storage(self) -> &'static str {
        DTYPES[self.0 as usize].storage
    }

    /// Our dtype, if safetensors, and so we, can hold it.
    pub(super) fn ours(self) -> Option<DType> {
        DTYPES[self.0 as usize].ours
    }

    fn find(is: impl Fn(&Row) -> bool) -> Option<Self> {
        DTYPES.iter().position(is).map(|nth| TorchDType(nth as u8))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_of_ours_has_one_of_torch_and_comes_back() {
        for dtype in DType::ALL {
            assert_eq!(TorchDType::of(dtype).ours(), Some(dtype));
        }
    }
}
