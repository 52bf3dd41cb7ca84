//! Random secrets that the ranks of a world share.

use std::fmt::Write;

use crate::{Error, Result};

/// Length of a token in hexadecimal digits.
pub(crate) const TOKEN_LEN: usize = 32;

/// Whether two secrets are the same, in a time that depends on their lengths only.
pub(crate) fn same(proof: &[u8], token: &[u8]) -> bool {
    let difference = proof.iter().zip(token).fold(0, |sum, (a, b)| sum | (a ^ b));
    proof.len() == token.len() && std::hint::black_box(difference) == 0
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_equal_secrets_are_the_same() {
        let token = random_hex().unwrap();
        assert_eq!(token.len(), TOKEN_LEN);
        assert!(same(token.as_bytes(), token.as_bytes()));
        for at in 0..TOKEN_LEN {
            let mut other = token.clone().into_bytes();
            other[at] ^= 1;
            assert!(!same(&other, token.as_bytes()), "byte {at}");
        }
        assert!(!same(b"", token.as_bytes()) && !same(&token.as_bytes()[1..], token.as_bytes()));
        assert_ne!(token, random_hex().unwrap());
    }
}
