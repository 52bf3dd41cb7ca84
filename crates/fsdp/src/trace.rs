//! What a unit does, as spans of `tracing`: `forward` and `backward`, with the unit's name. Without the feature there are none.

#[cfg(feature = "tracing")]
mod spans {
    /// A span that begins in one call and ends in another.
    #[derive(Debug)]
    pub(crate) struct Begun(tracing::Span);

    /// Runs `f` in the span of a unit's forward.
    pub(crate) fn forward<R>(unit: &str, f: impl FnOnce() -> R) -> R {
        tracing::debug_span!(target: "sconce_fsdp", "forward", unit).in_scope(f)
    }

    impl Begun {
        /// A unit's backward begins on this thread.
        pub(crate) fn backward(unit: &str) -> Self {
            let span = tracing::debug_span!(target: "sconce_fsdp", "backward", unit);
            span.with_subscriber(|(id, subscriber)| subscriber.enter(id));
            Self(span)
        }
    }

    impl Drop for Begun {
        fn drop(&mut self) {
            self.0.with_subscriber(|(id, subscriber)| subscriber.exit(id));
        }
    }
}

#[cfg(not(feature = "tracing"))]
mod spans {
    #[derive(Debug)]
    pub(crate) struct Begun;

    pub(crate) fn forward<R>(_unit: &str, f: impl FnOnce() -> R) -> R {
        f()
    }

    impl Begun {
        pub(crate) fn backward(_unit: &str) -> Self {
            Self
        }
    }
}

pub(crate) use spans::{Begun, forward};
