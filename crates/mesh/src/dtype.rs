//! The element types of tensors, and which of them collectives compute with. Conversions to candle's dtypes are in
//! `tensor.rs`.

use std::fmt;

use bytemuck::Pod;
use half::{bf16, f16};

/// Element type of a tensor.
///
/// Collectives compute with those of [`DType::ELEMENTS`]; the others are stored, loaded and moved as bytes. These are all
/// that a safetensors file can hold, but for floats that share a byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum DType {
    /// 8-bit unsigned integer.
    U8,
    /// 8-bit signed integer.
    I8,
    /// 16-bit signed integer.
    I16,
    /// 32-bit signed integer.
    I32,
    /// 64-bit signed integer.
    I64,
    /// 32-bit unsigned integer.
    U32,
    /// IEEE half precision; sums are accumulated in f32.
    F16,
    /// bfloat16; sums are accumulated in f32.
    BF16,
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
    /// A truth value in one byte.
    Bool,
    /// 16-bit unsigned integer.
    U16,
    /// 64-bit unsigned integer.
    U64,
    /// 8-bit float, 4 bits of exponent, without infinities (torch's `float8_e4m3fn`).
    F8E4M3,
    /// 8-bit float, 5 bits of exponent.
    F8E5M2,
    /// 8-bit power of two, a scale (torch's `float8_e8m0fnu`).
    F8E8M0,
    /// `F8E4M3` with another bias and one zero.
    F8E4M3Fnuz,
    /// `F8E5M2` with another bias and one zero.
    F8E5M2Fnuz,
    /// Complex number of two IEEE single precisions.
    C64,
}

impl DType {
    /// Every dtype, in declaration order, which only grows at its end: files number dtypes by it.
    pub const ALL: [DType; 19] = [
        DType::U8,
        DType::I8,
        DType::I16,
        DType::I32,
        DType::I64,
        DType::U32,
        DType::F16,
        DType::BF16,
        DType::F32,
        DType::F64,
        DType::Bool,
        DType::U16,
        DType::U64,
        DType::F8E4M3,
        DType::F8E5M2,
        DType::F8E8M0,
        DType::F8E4M3Fnuz,
        DType::F8E5M2Fnuz,
        DType::C64,
    ];

    /// The dtypes that have an [`Element`] and that collectives compute with.
    pub const ELEMENTS: [DType; 10] = [
        DType::U8,
        DType::I8,
        DType::I16,
        DType::I32,
        DType::I64,
        DType::U32,
        DType::F16,
        DType::BF16,
        DType::F32,
        DType::F64,
    ];

    /// Size of one element in bytes.
    pub const fn size_bytes(self) -> usize {
        match self {
            DType::U8 | DType::I8 | DType::Bool => 1,
            DType::F8E4M3 | DType::F8E5M2 | DType::F8E8M0 | DType::F8E4M3Fnuz | DType::F8E5M2Fnuz => 1,
            DType::I16 | DType::U16 | DType::F16 | DType::BF16 => 2,
            DType::I32 | DType::U32 | DType::F32 => 4,
            DType::I64 | DType::U64 | DType::F64 | DType::C64 => 8,
        }
    }

    /// Lower-case name as Rust and torch's short forms write it, safetensors in capitals: `f32`, `bf16`, `i64`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::U8 => "u8",
            DType::I8 => "i8",
            DType::I16 => "i16",
            DType::I32 => "i32",
            DType::I64 => "i64",
            DType::U32 => "u32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::F32 => "f32",
            DType::F64 => "f64",
            DType::Bool => "bool",
            DType::U16 => "u16",
            DType::U64 => "u64",
            DType::F8E4M3 => "f8_e4m3",
            DType::F8E5M2 => "f8_e5m2",
            DType::F8E8M0 => "f8_e8m0",
            DType::F8E4M3Fnuz => "f8_e4m3fnuz",
            DType::F8E5M2Fnuz => "f8_e5m2fnuz",
            DType::C64 => "c64",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A Rust type that collectives carry. Sealed: the list is [`DType::ELEMENTS`].
pub trait Element: Pod + Send + Sync + sealed::Sealed {
    /// The matching dtype.
    const DTYPE: DType;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! elements {
    ($($rust:ty => $dtype:ident),* $(,)?) => {$(
        impl sealed::Sealed for $rust {}
        impl Element for $rust {
            const DTYPE: DType = DType::$dtype;
        }
    )*};
}

elements! {
    u8 => U8, i8 => I8, i16 => I16, i32 => I32, i64 => I64, u32 => U32,
    f16 => F16, bf16 => BF16, f32 => F32, f64 => F64,
}
