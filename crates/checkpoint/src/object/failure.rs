//! What an object store's errors say to a caller, and which of them are worth another attempt.

use std::path::Path;

use object_store::Error as StoreError;

use crate::{Error, ObjectFailure};

/// The error of an operation on an object, with the causes that the store gives.
pub(super) fn of(op: &str, object: &Path, error: &StoreError) -> Error {
    let mut cause = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        let text = inner.to_string();
        // Most stores' errors say their cause already.
        if !cause.contains(&text) {
            cause = format!("{cause}: {text}");
        }
        source = inner.source();
    }
    let failure = match error {
        StoreError::NotFound { .. } => ObjectFailure::NotFound,
        StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. } => ObjectFailure::Denied,
        StoreError::NotSupported { .. }
        | StoreError::NotImplemented { .. }
        | StoreError::InvalidPath { .. }
        | StoreError::UnknownConfigurationKey { .. } => ObjectFailure::Unsupported,
        _ => ObjectFailure::Broken,
    };
    Error::ObjectStore { op: op.to_owned(), object: object.to_owned(), failure, cause }
}

/// Whether the same request may succeed later.
pub(super) fn is_transient(error: &StoreError) -> bool {
    matches!(error, StoreError::Generic { .. } | StoreError::JoinError { .. })
}

/// Whether an object could not be created because there is one.
pub(super) fn is_conflict(error: &StoreError) -> bool {
    matches!(error, StoreError::AlreadyExists { .. } | StoreError::Precondition { .. })
}
