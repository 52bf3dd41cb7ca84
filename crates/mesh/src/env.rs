//! RankEnv: who this process is among the ranks, from the environment that its launcher set. Reads; connects nothing.

use crate::{Error, Rank, Result};

/// Marks a store that the launcher hosts: rank 0 connects to it instead of hosting one itself.
#[cfg(feature = "tcp-store")]
pub(crate) const STORE_HOSTED: &str = "SCONCE_STORE_HOSTED";
/// The secret that every client of the store proves.
#[cfg(feature = "tcp-store")]
pub(crate) const STORE_TOKEN: &str = "SCONCE_STORE_TOKEN";

/// `True` if torchrun serves its own store at `MASTER_PORT`.
pub(crate) const AGENT_STORE: &str = "TORCHELASTIC_USE_AGENT_STORE";

/// A rank's place in the world, and where the world meets.
///
/// # Source
/// torchrun's environment variables, whose names the fields have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankEnv {
    /// Rank in the world.
    pub rank: Rank,
    /// Rank among those of this host.
    pub local_rank: usize,
    /// Number of ranks in the world.
    pub world_size: usize,
    /// Number of ranks on this host.
    pub local_world_size: usize,
    /// Host of the rendezvous store.
    pub master_addr: String,
    /// Port of the rendezvous store.
    pub master_port: u16,
}

/// The variables in which one launcher says rank, local rank, world size and local world size.
struct Launcher([&'static str; 4]);

/// In the order in which they are asked. What `mpirun` starts inside of a job of SLURM inherits the job's variables.
const LAUNCHERS: [Launcher; 4] = [
    Launcher(["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"]),
    Launcher([
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ]),
    Launcher(["SLURM_PROCID", "SLURM_LOCALID", SLURM_TASKS, "SLURM_NTASKS_PER_NODE"]),
    // MPICH and what descends from it.
    Launcher(["PMI_RANK", "MPI_LOCALRANKID", PMI_SIZE, "MPI_LOCALNRANKS"]),
];

/// Set by `srun` alone. A batch script and a shell of `salloc` have other variables of the job, and are one process.
const SLURM_TASKS: &str = "SLURM_STEP_NUM_TASKS";

/// Also set by `srun --mpi=pmi2`, for as many ranks as its own. `mpirun` may start one task of SLURM a host, for many ranks.
const PMI_SIZE: &str = "PMI_SIZE";

/// Set in every process that an MPI launcher starts, by one or the other.
const MPI_LAUNCHED: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"];

impl RankEnv {
    /// What the environment of this process says: torchrun's variables, else Open MPI's, else those of a step of SLURM
    /// (`srun`), else MPICH's, else a world of one.
    ///
    /// # Errors
    /// `Environment` naming the variable that is missing beside others, is no number, or does not fit.
    pub fn from_env() -> Result<RankEnv> {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    /// What the variables that `lookup` finds say.
    ///
    /// Under torchrun `MASTER_PORT` is taken by torchrun's own store, so ours is at the port after it. The local rank and the local world size default to the global ones.
    ///
    /// # Errors
    /// As [`RankEnv::from_env`].
    pub fn from_vars(lookup: impl Fn(&str) -> Option<String>) -> Result<RankEnv> {
        let found = LAUNCHERS.iter().find(|Launcher([rank, _, size, _])| {
            let (rank, said) = (lookup(rank), lookup(size));
            match *size {
                SLURM_TASKS => said.is_some() && lookup(PMI_SIZE).is_none_or(|pmi| Some(pmi) == said),
                _ => said.is_some() || rank.is_some(),
            }
        });
        let Some(Launcher([rank, local_rank, size, local_size])) = found else {
            return Ok(Self::alone());
        };
        let world_size = number(size, lookup(size), "a number of ranks, at least 1", |n| n > 0)?;
        let global = number(rank, lookup(rank), "a rank below the number of ranks", |n| n < world_size)?;
        let or = |name, default| match lookup(name) {
            None => Ok(default),
            value => number(name, value, "a number", |_| true),
        };
        Ok(RankEnv {
            rank: Rank(global),
            local_rank: or(local_rank, global)?,
            world_size,
            local_world_size: or(local_size, world_size)?,
            master_addr: lookup("MASTER_ADDR").unwrap_or_else(|| "127.0.0.1".to_owned()),
            master_port: port(lookup("MASTER_PORT"), lookup(AGENT_STORE).as_deref() == Some("True"))?,
        })
    }

    /// Whether an MPI launcher started this process and nobody else says who it is.
    pub(crate) fn is_mpi_job(lookup: impl Fn(&str) -> Option<String>) -> bool {
        let [rank, _, size, _] = LAUNCHERS[0].0;
        let of_torch = lookup(rank).is_some() || lookup(size).is_some();
        !of_torch && MPI_LAUNCHED.iter().any(|name| lookup(name).is_some())
    }

    fn alone() -> RankEnv {
        let master_addr = "127.0.0.1".to_owned();
        RankEnv {
            rank: Rank(0),
            local_rank: 0,
            world_size: 1,
            local_world_size: 1,
            master_addr,
            master_port: 0,
        }
    }

    /// torchrun's variables for this rank.
    pub fn to_vars(&self) -> [(&'static str, String); 6] {
        [
            ("RANK", self.rank.to_string()),
            ("LOCAL_RANK", self.local_rank.to_string()),
            ("WORLD_SIZE", self.world_size.to_string()),
            ("LOCAL_WORLD_SIZE", self.local_world_size.to_string()),
            ("MASTER_ADDR", self.master_addr.clone()),
            ("MASTER_PORT", self.master_port.to_string()),
        ]
    }
}

fn number(
    name: &str,
    value: Option<String>,
    expected: &'static str,
    fits: impl Fn(usize) -> bool,
) -> Result<usize> {
    let parsed = value.as_deref().and_then(|text| text.trim().parse().ok()).filter(|n| fits(*n));
    parsed.ok_or_else(|| Error::Environment { name: name.to_owned(), expected, got: value })
}

/// torch's default port where none is given; the one after it if `taken`.
fn port(value: Option<String>, taken: bool) -> Result<u16> {
    let Some(text) = value else { return Ok(29500 + u16::from(taken)) };
    let parsed = text.trim().parse::<u16>().ok().and_then(|port| port.checked_add(taken.into()));
    parsed.ok_or(Error::Environment { name: "MASTER_PORT".to_owned(), expected: "a port", got: Some(text) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(vars: &[(&str, &str)]) -> Result<RankEnv> {
        let get = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        RankEnv::from_vars(get)
    }

    #[test]
    fn torchrun_comes_before_open_mpi_and_both_before_slurm() {
        let mpi = [("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")];
        let slurm = [("SLURM_PROCID", "2"), ("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_LOCALID", "0")];
        let torch = [("RANK", "3"), ("WORLD_SIZE", "8"), ("MASTER_PORT", "1234")];
        let of_mpi = parse(&[&mpi[..], &slurm].concat()).unwrap();
        assert_eq!((of_mpi.rank, of_mpi.world_size), (Rank(1), 2), "mpirun inside of a job");
        let of_slurm = parse(&slurm).unwrap();
        assert_eq!((of_slurm.rank, of_slurm.local_rank, of_slurm.world_size), (Rank(2), 0, 4));
        let of_torch = parse(&[&mpi[..], &slurm, &torch].concat()).unwrap();
        assert_eq!((of_torch.rank, of_torch.world_size, of_torch.master_port), (Rank(3), 8, 1234));
    }

    #[test]
    fn a_job_of_slurm_is_a_world_only_where_srun_started_it() {
        let script = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4"), ("SLURM_LOCALID", "0")];
        assert_eq!(parse(&script).unwrap(), RankEnv::alone(), "a batch script is one process");
        assert_eq!(parse(&script[1..2]).unwrap(), RankEnv::alone(), "and so is a shell of salloc");
        let step = [("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_LOCALID", "0")];
        let pmi2 = [("PMI_RANK", "1"), ("PMI_SIZE", "2")];
        let env = parse(&[&step[..], &pmi2].concat()).unwrap();
        assert_eq!((env.rank, env.local_rank), (Rank(1), 0), "srun --mpi=pmi2");
        // One task of SLURM a host, which started 4 ranks.
        let hydra = [("PMI_RANK", "5"), ("PMI_SIZE", "8"), ("MPI_LOCALRANKID", "1")];
        let env = parse(&[&step[..], &hydra].concat()).unwrap();
        assert_eq!((env.rank, env.local_rank, env.world_size), (Rank(5), 1, 8), "mpirun by srun");
    }

    #[test]
    fn an_mpi_job_is_what_an_mpi_launcher_started_and_torchrun_did_not() {
        let is_mpi_job =
            |vars: &[&str]| RankEnv::is_mpi_job(|name| vars.contains(&name).then(|| "1".to_owned()));
        assert!(is_mpi_job(&["OMPI_COMM_WORLD_SIZE"]) && is_mpi_job(&["SLURM_PROCID", "PMIX_RANK"]));
        assert!(
            !is_mpi_job(&["OMPI_COMM_WORLD_SIZE", "RANK", "WORLD_SIZE"]) && !is_mpi_job(&["SLURM_PROCID"])
        );
        assert_eq!(parse(&[("PMI_RANK", "1"), ("PMI_SIZE", "2")]).unwrap().rank, Rank(1));
    }

    #[test]
    fn under_torchruns_own_store_ours_is_one_port_further() {
        let vars = [("RANK", "0"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_USE_AGENT_STORE", "True")];
        let port = |port: &'static str| parse(&[&vars[..], &[("MASTER_PORT", port)]].concat());
        assert_eq!(port("4000").unwrap().master_port, 4001);
        assert!(port("65535").is_err());
    }

    #[test]
    fn without_any_launcher_the_world_is_one() {
        assert_eq!(parse(&[]).unwrap(), RankEnv::alone());
    }

    #[test]
    fn half_an_environment_and_a_rank_outside_the_world_are_refused_by_name() {
        let half = parse(&[("RANK", "0")]).unwrap_err().to_string();
        assert_eq!(half, "environment variable WORLD_SIZE: expected a number of ranks, at least 1, got None");
        let outside = parse(&[("RANK", "2"), ("WORLD_SIZE", "2")]).unwrap_err().to_string();
        assert!(outside.starts_with("environment variable RANK: expected a rank below"), "{outside}");
        assert!(parse(&[("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_PORT", "x")]).is_err());
    }

    #[test]
    fn what_is_given_to_a_child_is_what_it_reads() {
        let env = parse(&[("RANK", "1"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "1")]).unwrap();
        let vars = env.to_vars();
        let vars: Vec<(&str, &str)> = vars.iter().map(|(n, v)| (*n, v.as_str())).collect();
        assert_eq!(parse(&vars).unwrap(), env);
    }
}
