//! Preemption: a job that is about to be killed saves once more, on all ranks at the same step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sconce_mesh::{ProcessGroup, ReduceOp};

use crate::Result;

/// Whether this job was asked to end: by SIGTERM, which SLURM, Kubernetes and `sconce-run` send some time before they
/// kill, or by whatever else sets a flag.
#[derive(Debug, Clone)]
pub struct Preemption {
    asked: Arc<AtomicBool>,
}

impl Preemption {
    /// Watches SIGTERM from here on: it no longer ends this process by itself.
    ///
    /// # Errors
    /// `Io`: the handler could not be installed.
    #[cfg(feature = "preemption")]
    pub fn on_sigterm() -> Result<Self> {
        let asked = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(signal_hook::consts::SIGTERM, Arc::clone(&asked))
            .map_err(|e| crate::Error::io("watch signals of", std::path::Path::new("this process"), &e))?;
        Ok(Self { asked })
    }

    /// Watches a flag of the caller's, such as one set by a watcher of a spot instance's notices.
    pub fn from_flag(asked: Arc<AtomicBool>) -> Self {
        Self { asked }
    }

    /// Whether this process was asked. Other ranks may not have been, or not yet: see [`Preemption::is_agreed`].
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// Whether any rank was asked, with the same answer on all of them: called once a step, it makes all ranks save at
    /// the same one.
    ///
    /// Ranks: collective over `group`, one byte; `None` is one process by itself.
    ///
    /// # Errors
    /// `Mesh`.
    ///
    /// # Source
    /// Orbax's `reached_preemption`.
    pub fn is_agreed(&self, group: Option<&ProcessGroup>) -> Result<bool> {
        let mut asked = [u8::from(self.is_asked())];
        if let Some(group) = group {
            group.all_reduce(&mut asked, ReduceOp::Max)?;
        }
        Ok(asked != [0])
    }
}
