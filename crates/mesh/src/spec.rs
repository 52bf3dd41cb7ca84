//! BackendSpec: which backend carries the tensors of which device, as users write it. Pure.

use std::fmt;
use std::str::FromStr;

use crate::{Error, RankEnv, Result};

/// The variable from which [`crate::ProcessGroup::from_env`] takes it.
pub(crate) const BACKEND: &str = "SCONCE_BACKEND";
const HAS_MPI: bool = cfg!(feature = "mpi");

/// Which backend carries the tensors of each device: `cpu:local` or `cpu:mpi`.
///
/// ```
/// use sconce_mesh::BackendSpec;
///
/// assert_eq!("cpu:local".parse(), Ok(BackendSpec::default()));
/// assert!("cpu:gloo".parse::<BackendSpec>().is_err());
/// ```
///
/// # Source
/// `torch.distributed.init_process_group(backend="cpu:gloo,cuda:nccl")`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BackendSpec {
    /// What carries tensors in host memory, and objects.
    pub cpu: CpuBackend,
}

/// A backend for host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CpuBackend {
    /// Shared memory: one host.
    #[default]
    Local,
    /// The site's MPI: any number of hosts, and shared memory on each. Feature `mpi`.
    Mpi,
}

impl BackendSpec {
    /// What `SCONCE_BACKEND` says; where it is not set, `cpu:mpi` in a process that an MPI launcher started if this
    /// build has it, and `cpu:local` in all others.
    ///
    /// # Errors
    /// `Environment` if it is no spec.
    pub fn from_env() -> Result<BackendSpec> {
        Self::from_vars(|name| std::env::var(name).ok(), HAS_MPI)
    }

    fn from_vars(lookup: impl Fn(&str) -> Option<String>, has_mpi: bool) -> Result<BackendSpec> {
        match lookup(BACKEND) {
            Some(text) => text.parse().map_err(|_| Error::Environment {
                name: BACKEND.into(),
                expected: "`cpu:local` or `cpu:mpi`",
                got: Some(text),
            }),
            None if has_mpi && RankEnv::is_mpi_job(lookup) => Ok(BackendSpec { cpu: CpuBackend::Mpi }),
            None => Ok(BackendSpec::default()),
        }
    }
}

impl FromStr for BackendSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<BackendSpec> {
        match text.trim() {
            "cpu:local" => Ok(BackendSpec { cpu: CpuBackend::Local }),
            "cpu:mpi" => Ok(BackendSpec { cpu: CpuBackend::Mpi }),
            _ => Err(Error::InvalidArgument {
                op: "backend spec",
                what: "device and backend".into(),
                expected: "`cpu:local` or `cpu:mpi`".into(),
                got: format!("{text:?}"),
            }),
        }
    }
}

impl fmt::Display for BackendSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.cpu {
            CpuBackend::Local => "cpu:local",
            CpuBackend::Mpi => "cpu:mpi",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_is_read_as_it_is_written() {
        for cpu in [CpuBackend::Local, CpuBackend::Mpi] {
            let spec = BackendSpec { cpu };
            assert_eq!(spec.to_string().parse(), Ok(spec));
        }
        let error = "cpu:gloo".parse::<BackendSpec>().unwrap_err().to_string();
        assert_eq!(
            error,
            "backend spec: device and backend: expected `cpu:local` or `cpu:mpi`, got \"cpu:gloo\""
        );
    }

    #[test]
    fn what_is_said_counts_more_than_who_started_the_process() {
        let spec = |vars: &[(&str, &str)], has_mpi| {
            let get = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
            BackendSpec::from_vars(get, has_mpi).map(|spec| spec.cpu)
        };
        let (job, local) = (("OMPI_COMM_WORLD_SIZE", "2"), ("SCONCE_BACKEND", "cpu:local"));
        assert_eq!(spec(&[job], true), Ok(CpuBackend::Mpi));
        assert_eq!(spec(&[job], false), Ok(CpuBackend::Local));
        assert_eq!(spec(&[job, local], true), Ok(CpuBackend::Local));
        assert_eq!(spec(&[], true), Ok(CpuBackend::Local));
        let error = spec(&[("SCONCE_BACKEND", "gloo")], true).unwrap_err().to_string();
        assert!(error.starts_with("environment variable SCONCE_BACKEND: expected `cpu:local`"), "{error}");
    }
}
