//! BackendSpec: which backend carries the tensors of which device, as users write it. Pure.

use std::fmt;
use std::str::FromStr;

use crate::{Error, RankEnv, Result};

/// The variable from which [`crate::ProcessGroup::from_env`] takes it.
pub(crate) const BACKEND: &str = "SCONCE_BACKEND";
const HAS_MPI: bool = cfg!(feature = "mpi");

const EXPECTED: &str =
    "`cpu:local` or `cpu:mpi`, and for CUDA devices `cuda:nccl` or `cuda:local`, with a comma between";

/// Which backend carries the tensors of each device: `cpu:local` or `cpu:mpi`, and after a comma, for CUDA devices,
/// `cuda:nccl` or `cuda:local`.
///
/// ```
/// use sconce_mesh::{BackendSpec, CpuBackend, CudaBackend};
///
/// assert_eq!("cpu:local".parse(), Ok(BackendSpec::default()));
/// let gpus = BackendSpec { cpu: CpuBackend::Mpi, cuda: Some(CudaBackend::Nccl) };
/// assert_eq!("cpu:mpi,cuda:nccl".parse(), Ok(gpus));
/// assert!("cpu:gloo".parse::<BackendSpec>().is_err());
/// ```
///
/// # Source
/// `torch.distributed.init_process_group(backend="cpu:gloo,cuda:nccl")`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BackendSpec {
    /// What carries tensors in host memory, and objects.
    pub cpu: CpuBackend,
    /// What carries tensors on CUDA devices; `None` for NCCL if this build has it, and else host memory.
    pub cuda: Option<CudaBackend>,
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

/// A backend for memory of CUDA devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CudaBackend {
    /// Through host memory and the backend for that: for several ranks on one device, or without NCCL. Feature `cuda`.
    Local,
    /// NCCL, from device to device. Feature `nccl`.
    Nccl,
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
                expected: EXPECTED,
                got: Some(text),
            }),
            None if has_mpi && RankEnv::is_mpi_job(lookup) => {
                Ok(BackendSpec { cpu: CpuBackend::Mpi, cuda: None })
            }
            None => Ok(BackendSpec::default()),
        }
    }
}

impl FromStr for BackendSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<BackendSpec> {
        let wrong = || Error::InvalidArgument {
            op: "backend spec",
            what: "device and backend".into(),
            expected: EXPECTED.into(),
            got: format!("{text:?}"),
        };
        let (mut cpu, mut cuda) = (None, None);
        for part in text.split(',') {
            let was = match part.trim() {
                "cpu:local" => cpu.replace(CpuBackend::Local).map(drop),
                "cpu:mpi" => cpu.replace(CpuBackend::Mpi).map(drop),
                "cuda:local" => cuda.replace(CudaBackend::Local).map(drop),
                "cuda:nccl" => cuda.replace(CudaBackend::Nccl).map(drop),
                _ => return Err(wrong()),
            };
            if was.is_some() {
                return Err(wrong());
            }
        }
        Ok(BackendSpec { cpu: cpu.unwrap_or_default(), cuda })
    }
}

impl fmt::Display for BackendSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.cpu {
            CpuBackend::Local => "cpu:local",
            CpuBackend::Mpi => "cpu:mpi",
        })?;
        self.cuda.map_or(Ok(()), |cuda| write!(f, ",{cuda}"))
    }
}

impl fmt::Display for CudaBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CudaBackend::Local => "cuda:local",
            CudaBackend::Nccl => "cuda:nccl",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_is_read_as_it_is_written() {
        for cpu in [CpuBackend::Local, CpuBackend::Mpi] {
            for cuda in [None, Some(CudaBackend::Local), Some(CudaBackend::Nccl)] {
                let spec = BackendSpec { cpu, cuda };
                assert_eq!(spec.to_string().parse(), Ok(spec));
            }
        }
        let only_cuda = BackendSpec { cuda: Some(CudaBackend::Nccl), ..BackendSpec::default() };
        assert_eq!("cuda:nccl".parse(), Ok(only_cuda));
        assert_eq!(" cuda:nccl , cpu:local".parse(), Ok(only_cuda));
        for text in
            ["cpu:gloo", "", "cpu:local,", "cpu:local,cpu:mpi", "cuda:nccl,cuda:local", "nccl", "cuda:mpi"]
        {
            let error = text.parse::<BackendSpec>().unwrap_err().to_string();
            let expected = format!("backend spec: device and backend: expected {EXPECTED}, got {text:?}");
            assert_eq!(error, expected);
        }
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
