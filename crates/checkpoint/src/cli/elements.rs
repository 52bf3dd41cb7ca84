//! Elements of any dtype: exact, to show and to compare, and as numbers, for statistics.

use std::fmt;

use half::{bf16, f16};
use sconce_dtensor::DType;
use serde_json::json;

use super::output::number;

/// One element as it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Element {
    Int(i128),
    Float(f64),
    Complex(f64, f64),
}

impl Element {
    /// The element that these little-endian bytes are.
    pub(super) fn of(dtype: DType, bytes: &[u8]) -> Self {
        match dtype {
            DType::I64 => Element::Int(i64::from_le_bytes(eight(bytes)).into()),
            DType::U64 => Element::Int(u64::from_le_bytes(eight(bytes)).into()),
            DType::C64 => {
                let (re, im) = complex(bytes);
                Element::Complex(re, im)
            }
            // All others are exact as they are.
            dtype => {
                let mut float = 0.0;
                numbers(dtype, bytes, &mut |number| float = number);
                Element::Float(float)
            }
        }
    }

    /// How far apart two elements of one dtype are; infinitely if one of them is no number.
    pub(super) fn distance(self, other: Self) -> f64 {
        if self == other {
            return 0.0;
        }
        let away = match (self, other) {
            (Element::Int(a), Element::Int(b)) => (a - b).unsigned_abs() as f64,
            (Element::Float(a), Element::Float(b)) => (a - b).abs(),
            (Element::Complex(a, b), Element::Complex(c, d)) => (a - c).hypot(b - d),
            _ => f64::NAN,
        };
        if away.is_nan() { f64::INFINITY } else { away }
    }

    /// For programs: a number, text for what JSON has no number for, a pair for a complex number.
    pub(super) fn json(self) -> serde_json::Value {
        let float = |float: f64| if float.is_finite() { json!(float) } else { json!(float.to_string()) };
        match self {
            Element::Int(int) => i64::try_from(int).map_or_else(|_| json!(int as u64), |int| json!(int)),
            Element::Float(one) => float(one),
            Element::Complex(re, im) => json!([float(re), float(im)]),
        }
    }

    /// For people: as short as it can be read.
    pub(super) fn short(self) -> String {
        match self {
            Element::Int(int) => int.to_string(),
            Element::Float(float) => number(float),
            Element::Complex(re, im) if im.is_sign_negative() => format!("{}-{}j", number(re), number(-im)),
            Element::Complex(re, im) => format!("{}+{}j", number(re), number(im)),
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Element::Int(int) => write!(f, "{int}"),
            Element::Float(float) => write!(f, "{float}"),
            Element::Complex(re, im) => write!(f, "{re}{im:+}j"),
        }
    }
}

/// Calls `each` with the elements of row-major little-endian bytes, in order. A complex number counts as its magnitude.
pub(super) fn numbers(dtype: DType, bytes: &[u8], each: &mut dyn FnMut(f64)) {
    let mut of =
        |size: usize, number: &dyn Fn(&[u8]) -> f64| bytes.chunks_exact(size).for_each(|e| each(number(e)));
    match dtype {
        DType::U8 | DType::Bool => of(1, &|e| f64::from(e[0])),
        DType::I8 => of(1, &|e| f64::from(e[0] as i8)),
        DType::I16 => of(2, &|e| f64::from(i16::from_le_bytes([e[0], e[1]]))),
        DType::U16 => of(2, &|e| f64::from(u16::from_le_bytes([e[0], e[1]]))),
        DType::F16 => of(2, &|e| f16::from_le_bytes([e[0], e[1]]).to_f64()),
        DType::BF16 => of(2, &|e| bf16::from_le_bytes([e[0], e[1]]).to_f64()),
        DType::I32 => of(4, &|e| f64::from(i32::from_le_bytes(four(e)))),
        DType::U32 => of(4, &|e| f64::from(u32::from_le_bytes(four(e)))),
        DType::F32 => of(4, &|e| f64::from(f32::from_le_bytes(four(e)))),
        DType::I64 => of(8, &|e| i64::from_le_bytes(eight(e)) as f64),
        DType::U64 => of(8, &|e| u64::from_le_bytes(eight(e)) as f64),
        DType::F64 => of(8, &|e| f64::from_le_bytes(eight(e))),
        DType::C64 => of(8, &|e| {
            let (re, im) = complex(e);
            re.hypot(im)
        }),
        DType::F8E4M3 => of(1, &|e| small(e[0], 4, 7, Specials::OneNan)),
        DType::F8E5M2 => of(1, &|e| small(e[0], 5, 15, Specials::Ieee)),
        DType::F8E4M3Fnuz => of(1, &|e| small(e[0], 4, 8, Specials::NegativeZeroIsNan)),
        DType::F8E5M2Fnuz => of(1, &|e| small(e[0], 5, 16, Specials::NegativeZeroIsNan)),
        DType::F8E8M0 => of(1, &|e| if e[0] == 255 { f64::NAN } else { (f64::from(e[0]) - 127.0).exp2() }),
    }
}

fn complex(bytes: &[u8]) -> (f64, f64) {
    let part = |bytes| f64::from(f32::from_le_bytes(four(bytes)));
    (part(&bytes[..4]), part(&bytes[4..]))
}

fn four(bytes: &[u8]) -> [u8; 4] {
    [bytes[0], bytes[1], bytes[2], bytes[3]]
}

fn eight(bytes: &[u8]) -> [u8; 8] {
    [bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]]
}

/// Which codes of an 8-bit float are no numbers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Specials {
    Ieee,
    OneNan,
    NegativeZeroIsNan,
}

/// An 8-bit float with that many bits of exponent.
fn small(code: u8, exponent_bits: u32, bias: i32, specials: Specials) -> f64 {
    let mantissa_bits = 7 - exponent_bits;
    let exponent = i32::from(code >> mantissa_bits & ((1 << exponent_bits) - 1));
    let mantissa = f64::from(code & ((1 << mantissa_bits) - 1)) / f64::from(1 << mantissa_bits);
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    match specials {
        Specials::NegativeZeroIsNan if code == 0x80 => return f64::NAN,
        Specials::OneNan if code & 0x7f == 0x7f => return f64::NAN,
        Specials::Ieee if exponent == (1 << exponent_bits) - 1 => {
            return if mantissa == 0.0 { sign * f64::INFINITY } else { f64::NAN };
        }
        _ => {}
    }
    if exponent == 0 {
        return sign * mantissa * f64::from(1 - bias).exp2();
    }
    sign * (1.0 + mantissa) * f64::from(exponent - bias).exp2()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(dtype: DType, bytes: &[u8]) -> f64 {
        let mut number = 0.0;
        numbers(dtype, bytes, &mut |n| number = n);
        number
    }

    #[test]
    fn elements_are_exact_and_told_apart() {
        let int = |n: i64| Element::of(DType::I64, &n.to_le_bytes());
        let (a, b) = (int(1 << 53), int((1 << 53) + 1));
        assert_eq!((a.distance(b), a.distance(a)), (1.0, 0.0));
        assert_eq!((b.short(), b.json()), ("9007199254740993".to_owned(), json!(9_007_199_254_740_993i64)));
        assert_eq!(Element::of(DType::U64, &u64::MAX.to_le_bytes()).json(), json!(u64::MAX));
        let complex =
            |re: f32, im: f32| Element::of(DType::C64, &[re.to_le_bytes(), im.to_le_bytes()].concat());
        // Of one magnitude.
        assert_eq!(complex(3.0, 4.0).distance(complex(4.0, 3.0)), 2f64.sqrt());
        assert_eq!(
            (complex(3.0, -4.0).short(), complex(3.0, -4.0).to_string()),
            ("3-4j".into(), "3-4j".into())
        );
        assert_eq!(complex(f32::NAN, 0.0).distance(complex(1.0, 0.0)), f64::INFINITY);
        assert_eq!(Element::of(DType::F32, &f32::INFINITY.to_le_bytes()).json(), json!("inf"));
    }

    #[test]
    fn eight_bit_floats_have_their_published_values() {
        assert_eq!(one(DType::F8E4M3, &[0x7e]), 448.0);
        assert_eq!(one(DType::F8E4M3, &[0x01]), 2f64.powi(-9));
        assert!(one(DType::F8E4M3, &[0xff]).is_nan());
        assert_eq!(one(DType::F8E5M2, &[0x7b]), 57344.0);
        assert_eq!(one(DType::F8E5M2, &[0xfc]), f64::NEG_INFINITY);
        assert_eq!(one(DType::F8E4M3Fnuz, &[0x7f]), 240.0);
        assert!(one(DType::F8E5M2Fnuz, &[0x80]).is_nan());
        assert_eq!(one(DType::F8E8M0, &[127]), 1.0);
        assert_eq!(one(DType::C64, &[0, 0, 64, 64, 0, 0, 128, 64]), 5.0);
    }
}
