//! From the environment to a world: what a rank calls first.

#[cfg(feature = "tcp-store")]
use std::sync::Arc;

#[cfg(not(all(feature = "tcp-store", feature = "mpi")))]
use crate::Error;
#[cfg(feature = "tcp-store")]
use crate::env::{STORE_HOSTED, STORE_TOKEN};
use crate::{BackendSpec, CpuBackend, GroupOptions, ProcessGroup, RankEnv, Result};
#[cfg(feature = "tcp-store")]
use crate::{TcpStore, TcpStoreServer};

impl ProcessGroup {
    /// Joins the world that the environment describes ([`RankEnv::from_env`]): a world of one if there is none.
    ///
    /// `SCONCE_BACKEND` may name the backend ([`BackendSpec::from_env`]). Without MPI the ranks meet at a store over TCP:
    /// the launcher's own, or else one that rank 0 hosts at `MASTER_ADDR` and `MASTER_PORT`. `SCONCE_STORE_TOKEN`, if
    /// set, is the secret that they prove to it; without it anybody who can reach the port can join, so set it where
    /// others share the machine.
    ///
    /// Ranks: collective; every rank of the world calls it.
    ///
    /// # Errors
    /// `Environment`; `Store` if the ranks do not meet within `options.timeout`; as [`ProcessGroup::new`].
    /// `NotCompiled` for more than one rank without feature `tcp-store`, for `cpu:mpi` without feature `mpi`,
    /// for `cuda:nccl` without feature `nccl`, and for `cuda:local` without feature `cuda`.
    ///
    /// # Source
    /// `torch.distributed.init_process_group(init_method="env://")`.
    pub fn from_env(options: GroupOptions) -> Result<ProcessGroup> {
        Self::from_env_with(BackendSpec::from_env()?, options)
    }

    /// [`ProcessGroup::from_env`] with backends named by the program.
    ///
    /// Ranks: collective; every rank of the world calls it with the same backends.
    ///
    /// # Errors
    /// As [`ProcessGroup::from_env`].
    ///
    /// # Source
    /// `torch.distributed.init_process_group(backend=…, init_method="env://")`.
    pub fn from_env_with(backends: BackendSpec, options: GroupOptions) -> Result<ProcessGroup> {
        let env = RankEnv::from_env()?;
        backends.cuda.map_or(Ok(()), ProcessGroup::check_cuda)?;
        let world = match backends.cpu {
            CpuBackend::Mpi => join_mpi(&env, options),
            CpuBackend::Local if env.world_size == 1 => Ok(ProcessGroup::threads(1, options)?.remove(0)),
            CpuBackend::Local => join(&env, options),
        };
        match backends.cuda {
            Some(cuda) => world?.with_cuda(cuda),
            None => world,
        }
    }
}

#[cfg(not(feature = "mpi"))]
fn join_mpi(_env: &RankEnv, _options: GroupOptions) -> Result<ProcessGroup> {
    Err(Error::NotCompiled { what: "backend `cpu:mpi`", feature: "mpi" })
}

/// Where the environment describes ranks as well, they must be MPI's.
#[cfg(feature = "mpi")]
fn join_mpi(env: &RankEnv, options: GroupOptions) -> Result<ProcessGroup> {
    let world = ProcessGroup::mpi(options)?;
    if env.world_size == 1 || (env.world_size, env.rank) == (world.world_size(), world.rank()) {
        return Ok(world);
    }
    Err(crate::Error::Environment {
        name: "RANK and WORLD_SIZE".into(),
        expected: "the rank and size of MPI_COMM_WORLD: start the program by mpirun or srun",
        got: Some(format!(
            "{} of {}; in MPI {} of {}",
            env.rank,
            env.world_size,
            world.rank(),
            world.world_size()
        )),
    })
}

#[cfg(not(feature = "tcp-store"))]
fn join(_env: &RankEnv, _options: GroupOptions) -> Result<ProcessGroup> {
    Err(Error::NotCompiled { what: "a world of several processes", feature: "tcp-store" })
}

#[cfg(feature = "tcp-store")]
fn join(env: &RankEnv, options: GroupOptions) -> Result<ProcessGroup> {
    let token = std::env::var(STORE_TOKEN).unwrap_or_default();
    let addr = format!("{}:{}", env.master_addr, env.master_port);
    let hosts = env.rank.0 == 0 && std::env::var_os(STORE_HOSTED).is_none();
    let server = if hosts { Some(TcpStoreServer::bind_to(&addr, &token)?) } else { None };
    let store = TcpStore::connect(&addr, &token, options.timeout)?;
    let joined = ProcessGroup::new(Arc::new(store), env.rank, env.world_size, options);
    // The store is needed to join only, and a rank returns from joining when all have come.
    drop(server);
    joined
}
