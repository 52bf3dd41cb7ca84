//! From the environment to a world: what a rank calls first.

#[cfg(feature = "tcp-store")]
use std::sync::Arc;

#[cfg(not(feature = "tcp-store"))]
use crate::Error;
#[cfg(feature = "tcp-store")]
use crate::env::{STORE_HOSTED, STORE_TOKEN};
use crate::{GroupOptions, ProcessGroup, RankEnv, Result};
#[cfg(feature = "tcp-store")]
use crate::{TcpStore, TcpStoreServer};

impl ProcessGroup {
    /// Joins the world that the environment describes ([`RankEnv::from_env`]): a world of one if there is none.
    ///
    /// The ranks meet at a store over TCP: the launcher's own, or else one that rank 0 hosts at `MASTER_ADDR` and
    /// `MASTER_PORT`. `SCONCE_STORE_TOKEN`, if set, is the secret that they prove to it; without it anybody who can
    /// reach the port can join, so set it where others share the machine.
    ///
    /// Ranks: collective; every rank of the world calls it.
    ///
    /// # Errors
    /// `Environment`; `Store` if the ranks do not meet within `options.timeout`; as [`ProcessGroup::new`].
    /// `NotCompiled` for more than one rank without feature `tcp-store`.
    ///
    /// # Source
    /// `torch.distributed.init_process_group(init_method="env://")`.
    pub fn from_env(options: GroupOptions) -> Result<ProcessGroup> {
        let env = RankEnv::from_env()?;
        if env.world_size == 1 {
            return Ok(ProcessGroup::threads(1, options)?.remove(0));
        }
        join(&env, options)
    }
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
