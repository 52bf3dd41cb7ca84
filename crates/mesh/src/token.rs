//! Random secrets that the ranks of a world share.

use std::fmt::Write;

use crate::{Error, Result};

/// Length of a token in hexadecimal digits.
pub(crate) const TOKEN_LEN: usize = 32;

/// 128 bits from the kernel's generator, in hexadecimal.
pub(crate) fn random_hex() -> Result<String> {
    let mut bytes = [0u8; TOKEN_LEN / 2];
    let flags = rustix::rand::GetRandomFlags::empty();
    rustix::rand::getrandom(&mut bytes, flags).map_err(|errno| Error::Backend {
        backend: "token",
        call: "getrandom".to_owned(),
        cause: errno.to_string(),
    })?;
    Ok(bytes.iter().fold(String::new(), |mut hex, byte| {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    }))
}
