//! ProcessGroup: the handle with which one rank talks to the other ranks of a group.
//!
//! Here: how groups come to be and what they are. What they do is in `collective.rs`.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

#[cfg(feature = "cuda")]
use crate::ReduceOp;
#[cfg(feature = "cuda")]
use crate::backend::Call;
#[cfg(feature = "cuda")]
use crate::backend::device::DeviceBackend;
use crate::backend::local::{Endpoint, LocalWorld};
use crate::backend::recorded::Recorded;
use crate::backend::solo::Solo;
use crate::backend::{Backend, CallName, Invitation, Membership, WorldBackend};
use crate::flight_recorder::FlightRecorder;
use crate::work::Progress;
use crate::{CudaBackend, Error, FlightRecord, GroupRank, Rank, Result, Store};

/// How a world's groups behave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupOptions {
    /// How long a collective, or joining a group, may take before it fails with `Timeout`.
    pub timeout: Duration,
}

impl Default for GroupOptions {
    /// Five minutes.
    fn default() -> Self {
        GroupOptions { timeout: Duration::from_secs(300) }
    }
}

/// One rank's handle of a group of ranks.
///
/// Collectives are called by all ranks of the group in the same order. A clone is the same handle; it may be used
/// from any thread, one collective at a time.
///
/// A rank leaves its world when the last handle of any of the world's groups is dropped. Collectives that still
/// need it then fail with `PeerLost`; those that it has finished its part of do not. A process that ends, or a
/// thread that panics, without having left is lost to the whole world: every group of it fails.
///
/// # Source
/// `torch.distributed.ProcessGroup`. Groups are made from a partition of ranks at once, not one list at a time,
/// so that all ranks of the parent call together.
#[derive(Clone)]
pub struct ProcessGroup {
    group: Arc<Group>,
    world: Arc<World>,
}

/// One group as one rank sees it. It does not refer to the world, which holds it.
struct Group {
    name: String,
    ranks: Arc<[Rank]>,
    group_rank: GroupRank,
    backend: Recorded,
    recorder: Arc<FlightRecorder>,
    progress: Progress,
    /// What carries tensors on CUDA devices, from the first on.
    device: DeviceSlot,
}

/// One direction between two ranks: its works in order, and its group once both have come.
#[derive(Default)]
pub(crate) struct Lane {
    progress: Progress,
    group: OnceLock<Arc<Group>>,
}

impl Lane {
    pub(crate) fn progress(&self) -> &Progress {
        &self.progress
    }
}

/// What all groups of one rank's world share.
struct World {
    size: usize,
    options: GroupOptions,
    /// Absent in a world of one.
    backend: Option<Box<dyn WorldBackend>>,
    /// Every group made so far. A group lives as long as the world, so that all ranks agree on whether it exists.
    groups: Mutex<HashMap<Arc<[Rank]>, Arc<Group>>>,
    /// Groups of ranks that have one already.
    duplicates: Mutex<Vec<Arc<Group>>>,
    /// Directions used so far, by sender and receiver.
    lanes: Mutex<HashMap<(Rank, Rank), Arc<Lane>>>,
    /// What shall carry tensors on CUDA devices, if somebody said so.
    cuda: OnceLock<CudaBackend>,
}

impl ProcessGroup {
    /// Joins the world of `world_size` processes on this host as `rank`.
    ///
    /// Each process holds one file descriptor for each rank while it is in the world.
    /// Ranks:  collective; every rank of the world calls it with the same store and options.
    ///
    /// # Errors
    /// `InvalidArgument` if `rank` is not below `world_size`, or another process joined as `rank`; `Timeout`
    /// naming the ranks that did not come within `options.timeout`; `PeerLost` if rank 0 died meanwhile; `Store`;
    /// `Backend` if a system call fails.
    ///
    /// # Source
    /// `torch.distributed.init_process_group(store=…, rank=…, world_size=…)`.
    pub fn new(
        store: Arc<dyn Store>,
        rank: Rank,
        world_size: usize,
        options: GroupOptions,
    ) -> Result<ProcessGroup> {
        check_rank(rank, world_size)?;
        if world_size == 1 {
            return Ok(Self::solo(options));
        }
        let (local, endpoint) = LocalWorld::join(&*store, membership(rank, world_size, options))?;
        Ok(Self::of_world(Box::new(local), Box::new(endpoint), rank, world_size, options))
    }

    /// Joins the world of all processes of the MPI job, on one host or many, by the site's own MPI.
    ///
    /// Ranks of one host talk through shared memory, and MPI runs between the hosts' first ranks. A rank that dies is
    /// `PeerLost` on the others where MPI has ULFM (`mpirun --with-ft ulfm` of Open MPI 5); elsewhere the launcher ends the
    /// whole job. `mpirun --mca mpi_yield_when_idle 1` helps where ranks outnumber cores. `SCONCE_HOST_ID`, if set, says
    /// which ranks share memory: those with the same value.
    ///
    /// Ranks:  collective; every process of the job calls it.
    ///
    /// # Errors
    /// `Timeout` if not all processes came within `options.timeout`; `PeerLost`; `Backend` if MPI fails, has ended, or
    /// cannot be called from several threads in turn.
    ///
    /// # Source
    /// `torch.distributed.init_process_group(backend="mpi")`; MPI 3.1, `MPI_THREAD_SERIALIZED`.
    #[cfg(feature = "mpi")]
    pub fn mpi(options: GroupOptions) -> Result<ProcessGroup> {
        let (world, of_all) = crate::backend::mpi::MpiWorld::join(options.timeout)?;
        let (rank, size) = (world.rank(), world.size());
        if size == 1 {
            return Ok(Self::solo(options));
        }
        Ok(Self::of_world(Box::new(world), Box::new(of_all), rank, size, options))
    }

    /// A world of `world_size` ranks in this process: one handle for each, to be moved to a thread of its own.
    ///
    /// Ranks:  called once, by no rank.
    ///
    /// ```
    /// use sconce_mesh::{GroupOptions, ProcessGroup, ReduceOp};
    ///
    /// let groups = ProcessGroup::threads(2, GroupOptions::default())?;
    /// let ranks = groups.into_iter().map(|group| {
    ///     std::thread::spawn(move || {
    ///         let mut sum = [1.0f32 + group.rank().0 as f32];
    ///         group.all_reduce(&mut sum, ReduceOp::Sum).map(|()| sum)
    ///     })
    /// });
    /// for rank in ranks.collect::<Vec<_>>() {
    ///     assert_eq!(rank.join().unwrap()?, [3.0]);
    /// }
    /// # Ok::<(), sconce_mesh::Error>(())
    /// ```
    ///
    /// # Errors
    /// `InvalidArgument` if `world_size` is 0; `Backend` if memory cannot be mapped.
    pub fn threads(world_size: usize, options: GroupOptions) -> Result<Vec<ProcessGroup>> {
        check_rank(Rank(0), world_size)?;
        if world_size == 1 {
            return Ok(vec![Self::solo(options)]);
        }
        let worlds = (0..world_size).map(|rank| membership(Rank(rank), world_size, options)).collect();
        let joined = LocalWorld::threads(worlds)?.into_iter().enumerate();
        let handle = |(rank, (local, endpoint)): (usize, (LocalWorld, Endpoint))| {
            Self::of_world(Box::new(local), Box::new(endpoint), Rank(rank), world_size, options)
        };
        Ok(joined.map(handle).collect())
    }

    /// A world of one: collectives are copies, and nothing is asked of the system.
    pub fn single() -> ProcessGroup {
        Self::solo(GroupOptions::default())
    }

    fn solo(options: GroupOptions) -> ProcessGroup {
        let backend = Box::new(Solo::new("world".into(), Rank(0)));
        let group = Group::new("world".into(), Arc::new([Rank(0)]), GroupRank(0), backend);
        Self::with_world(None, group, 1, options)
    }

    fn of_world(
        backend: Box<dyn WorldBackend>,
        of_all: Box<dyn Backend>,
        rank: Rank,
        size: usize,
        options: GroupOptions,
    ) -> ProcessGroup {
        let group = Group::new("world".into(), (0..size).map(Rank).collect(), GroupRank(rank.0), of_all);
        Self::with_world(Some(backend), group, size, options)
    }

    fn with_world(
        backend: Option<Box<dyn WorldBackend>>,
        group: Group,
        size: usize,
        options: GroupOptions,
    ) -> ProcessGroup {
        let group = Arc::new(group);
        let groups = Mutex::new(HashMap::from([(Arc::clone(&group.ranks), Arc::clone(&group))]));
        let lanes = Mutex::default();
        let duplicates = Mutex::default();
        ProcessGroup {
            group,
            world: Arc::new(World {
                size,
                options,
                backend,
                groups,
                duplicates,
                lanes,
                cuda: OnceLock::new(),
            }),
        }
    }

    /// The same world, whose tensors on CUDA devices `backend` carries, in all its groups.
    ///
    /// Without it that is NCCL if this build has it, and else host memory.
    /// Ranks:  local, no communication; all ranks choose the same.
    ///
    /// # Errors
    /// `NotCompiled`; `InvalidArgument` if another one was chosen before.
    ///
    /// # Source
    /// `torch.distributed.init_process_group(backend="cpu:gloo,cuda:nccl")`.
    pub fn with_cuda(self, backend: CudaBackend) -> Result<ProcessGroup> {
        Self::check_cuda(backend)?;
        let chosen = *self.world.cuda.get_or_init(|| backend);
        if chosen == backend {
            return Ok(self);
        }
        Err(Error::InvalidArgument {
            op: "with_cuda",
            what: "backend".into(),
            expected: format!("{chosen}, which was chosen before"),
            got: backend.to_string(),
        })
    }

    /// Whether this build has `backend`.
    pub(crate) fn check_cuda(backend: CudaBackend) -> Result<()> {
        match backend {
            CudaBackend::Nccl if !cfg!(feature = "nccl") => {
                Err(Error::NotCompiled { what: "backend `cuda:nccl`", feature: "nccl" })
            }
            CudaBackend::Local if !cfg!(feature = "cuda") => {
                Err(Error::NotCompiled { what: "backend `cuda:local`", feature: "cuda" })
            }
            _ => Ok(()),
        }
    }

    /// This rank in the world.
    pub fn rank(&self) -> Rank {
        self.group.ranks[self.group.group_rank.0]
    }

    /// This rank in the group.
    pub fn group_rank(&self) -> GroupRank {
        self.group.group_rank
    }

    /// Number of ranks in the group.
    pub fn size(&self) -> usize {
        self.group.ranks.len()
    }

    /// Number of ranks in the world.
    pub fn world_size(&self) -> usize {
        self.world.size
    }

    /// The group's ranks in the world, in group-rank order.
    pub fn ranks(&self) -> &[Rank] {
        &self.group.ranks
    }

    /// The group's name in messages; unique in its world.
    pub fn name(&self) -> &str {
        &self.group.name
    }

    /// The deadline of each collective.
    pub fn timeout(&self) -> Duration {
        self.world.options.timeout
    }

    /// Whether both handles are of one group, as one rank sees it.
    pub fn same_group(&self, other: &ProcessGroup) -> bool {
        Arc::ptr_eq(&self.group, &other.group)
    }

    /// Whether both handles are of groups of one world, as one rank sees it.
    pub fn same_world(&self, other: &ProcessGroup) -> bool {
        Arc::ptr_eq(&self.world, &other.world)
    }

    /// Fails the group on every rank with `Aborted` naming this one; pending collectives return as well, and so do sends
    /// and receives between its ranks that have sent to each other before.
    ///
    /// For a rank that cannot go on and must not let the others wait for the deadline.
    /// Ranks:  local, no communication.
    pub fn abort(&self) {
        self.group.backend.abort();
        let lanes = self.world.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let is_ours = |(from, to): &(Rank, Rank)| self.ranks().contains(from) && self.ranks().contains(to);
        for (_, lane) in lanes.iter().filter(|(ends, _)| is_ours(ends)) {
            if let Some(channel) = lane.group.get() {
                channel.backend.abort();
            }
        }
    }

    /// Why the group failed, if it did: what every later collective on it returns.
    pub fn failure(&self) -> Option<Error> {
        self.group.backend.failure()
    }

    /// The last 1024 collectives of this group on this rank, those under way included.
    ///
    /// A group that fails writes its record, with the error, to a file `rank-R-GROUP.txt` in the directory that the
    /// environment variable `SCONCE_FLIGHT_DIR` names, if it is set.
    /// Ranks:  local, no communication.
    pub fn flight_record(&self) -> FlightRecord {
        self.group.recorder.snapshot()
    }

    /// Makes the groups of `partition`, disjoint lists of ranks in group-rank order, and returns the one that holds
    /// this rank, or `None`.
    ///
    /// A list that was used before, of whatever parent, gives the same group again.
    /// Ranks:  collective over this group; every rank passes the same lists.
    ///
    /// # Errors
    /// `InvalidArgument` if a list is empty, a rank occurs twice or is not of this group; `Mismatch` if ranks pass
    /// different lists; as a collective, `PeerLost` and `Timeout`.
    pub fn subgroups(&self, partition: &[Vec<Rank>]) -> Result<Option<ProcessGroup>> {
        self.check_partition(partition)?;
        let ranks: Option<Arc<[Rank]>> =
            partition.iter().find(|ranks| ranks.contains(&self.rank())).map(|ranks| ranks[..].into());
        let known = ranks.as_ref().and_then(|ranks| self.world.find(ranks));
        let invitation = match &self.world.backend {
            Some(backend) => backend.invite(ranks.as_deref().filter(|_| known.is_none()))?,
            None => Invitation { text: String::new(), offer: None },
        };
        let texts = self.agree_on_partition("subgroups", partition, &invitation.text)?;
        let new = ranks.filter(|_| known.is_none());
        let new = new.map(|ranks| (group_name(&ranks), ranks));
        let opened = self.world.open(self.rank(), new, invitation, &texts)?.map(Arc::new);
        opened.iter().for_each(|group| self.world.keep(Arc::clone(group)));
        Ok(known.or(opened).map(|group| self.sibling(group)))
    }

    /// A further group of the same ranks in the same order, with collectives of its own: for work beside training, such as
    /// a checkpoint that is saved in the background.
    ///
    /// It lives as long as the world.
    /// Ranks:  collective over this group.
    ///
    /// # Errors
    /// As a collective, `Mismatch`, `PeerLost` and `Timeout`.
    ///
    /// # Source
    /// `MPI_Comm_dup`; `torch.distributed.new_group`, which never gives a group twice.
    pub fn duplicate(&self) -> Result<ProcessGroup> {
        let ranks = Arc::clone(&self.group.ranks);
        let invitation = match &self.world.backend {
            Some(backend) => backend.invite(Some(&ranks))?,
            None => Invitation { text: String::new(), offer: None },
        };
        let texts = self.agree_on_partition("duplicate", &[ranks.to_vec()], &invitation.text)?;
        let new = Some((self.world.duplicate_name(&ranks), ranks));
        let Some(group) = self.world.open(self.rank(), new, invitation, &texts)? else {
            unreachable!("a group that is asked for is opened");
        };
        let group = Arc::new(group);
        self.world.duplicates.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&group));
        Ok(self.sibling(group))
    }

    /// The direction from one rank of this group to another; `None` if the group lacks one or they are the same.
    pub(crate) fn lane(&self, from: GroupRank, to: GroupRank) -> Option<Arc<Lane>> {
        let ends = (*self.ranks().get(from.0)?, *self.ranks().get(to.0)?);
        let mut lanes = self.world.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        (from != to).then(|| Arc::clone(lanes.entry(ends).or_default()))
    }

    /// The group of the two ends of `lane`, once the works issued on it before are done.
    pub(crate) fn channel(&self, lane: &Lane, from: GroupRank, to: GroupRank) -> Result<ProcessGroup> {
        lane.progress.settle()?;
        if let Some(group) = lane.group.get() {
            return Ok(self.sibling(Arc::clone(group)));
        }
        let Some(backend) = &self.world.backend else { unreachable!("a world of one has no other rank") };
        let (from, to) = (self.ranks()[from.0], self.ranks()[to.0]);
        let membership = Membership {
            group: format!("{from} to {to}"),
            ranks: [from, to].into(),
            group_rank: usize::from(self.rank() == to),
            timeout: self.timeout(),
        };
        let (name, ranks) = (membership.group.clone(), Arc::clone(&membership.ranks));
        let group_rank = GroupRank(membership.group_rank);
        let group = Arc::new(Group::new(name, ranks, group_rank, backend.channel(membership)?));
        Ok(self.sibling(Arc::clone(lane.group.get_or_init(|| group))))
    }

    fn sibling(&self, group: Arc<Group>) -> ProcessGroup {
        ProcessGroup { group, world: Arc::clone(&self.world) }
    }

    fn check_partition(&self, partition: &[Vec<Rank>]) -> Result<()> {
        let wrong = |expected: &str, got: String| Error::InvalidArgument {
            op: "subgroups",
            what: format!("partition of group {}", self.name()),
            expected: expected.into(),
            got,
        };
        let mut seen = std::collections::HashSet::new();
        for ranks in partition {
            if ranks.is_empty() {
                return Err(wrong("lists of one rank or more", "an empty list".into()));
            }
            if let Some(rank) = ranks.iter().find(|rank| !self.ranks().contains(rank)) {
                return Err(wrong("ranks of this group", format!("rank {rank}")));
            }
            if let Some(rank) = ranks.iter().find(|rank| !seen.insert(**rank)) {
                return Err(wrong("each rank once at most", format!("rank {rank} twice")));
            }
        }
        Ok(())
    }

    /// Compares the partition with the other ranks', and exchanges their invitations on the way.
    fn agree_on_partition(
        &self,
        op: &str,
        partition: &[Vec<Rank>],
        invitation: &str,
    ) -> Result<Vec<(Rank, String)>> {
        let lists: Vec<String> = partition.iter().map(|ranks| list(ranks)).collect();
        let message = format!("{invitation}\n{op}({})", lists.join(" "));
        let messages = self.exchange_objects(CallName::Subgroups, message.as_bytes())?;
        let messages: Vec<String> =
            messages.iter().map(|message| String::from_utf8_lossy(message).into_owned()).collect();
        let split = |message: &str| {
            let (invitation, lists) = message.split_once('\n').unwrap_or((message, ""));
            (invitation.to_owned(), lists.to_owned())
        };
        let (invitations, lists): (Vec<_>, Vec<_>) = messages.iter().map(|message| split(message)).unzip();
        match lists.iter().position(|other| *other != lists[0]) {
            None => Ok(self.ranks().iter().copied().zip(invitations).collect()),
            Some(other) => Err(Error::Mismatch {
                group: self.name().into(),
                seq: 0,
                expected_rank: self.ranks()[0],
                expected: lists[0].clone(),
                got_rank: self.ranks()[other],
                got: lists[other].clone(),
            }),
        }
    }

    /// What carries calls out, once those issued before are done.
    ///
    /// # Errors
    /// `InvalidArgument` inside of a work that one of them waits for.
    pub(crate) fn backend(&self) -> Result<&dyn Backend> {
        self.group.progress.settle()?;
        Ok(&self.group.backend)
    }

    pub(crate) fn progress(&self) -> &Progress {
        &self.group.progress
    }

    /// Carries a collective of device memory out, once the works issued before are done. `sizes` are the bytes of the
    /// longest buffer and those that are received.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(
        &self,
        call: (Call, Option<ReduceOp>),
        sizes: (usize, usize),
        run: impl FnOnce(&dyn DeviceBackend, &dyn Backend) -> Result<()>,
    ) -> Result<()> {
        self.group.progress.settle()?;
        let device = self.group.device.get_or_init(|| {
            let membership = Membership {
                group: self.name().to_owned(),
                ranks: Arc::clone(&self.group.ranks),
                group_rank: self.group_rank().0,
                timeout: self.timeout(),
            };
            device_backend(self.world.cuda.get().copied(), membership)
        });
        self.group.backend.device(call, sizes, |host| run(&**device, host))
    }
}

impl fmt::Debug for ProcessGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessGroup")
            .field("name", &self.name())
            .field("rank", &self.rank().0)
            .field("ranks", &list(self.ranks()))
            .finish()
    }
}

impl Group {
    fn new(name: String, ranks: Arc<[Rank]>, group_rank: GroupRank, backend: Box<dyn Backend>) -> Group {
        let recorder = FlightRecorder::new(name.clone(), Arc::clone(&ranks), ranks[group_rank.0]);
        let recorder = Arc::new(recorder);
        let backend = Recorded::new(decorated(backend, &name, ranks[group_rank.0]), Arc::clone(&recorder));
        Group {
            name,
            ranks,
            group_rank,
            backend,
            recorder,
            progress: Progress::default(),
            device: DeviceSlot::default(),
        }
    }
}

/// What carries tensors on CUDA devices, from the first on.
#[cfg(feature = "cuda")]
type DeviceSlot = OnceLock<Box<dyn DeviceBackend>>;

/// Nothing carries tensors on CUDA devices.
#[cfg(not(feature = "cuda"))]
type DeviceSlot = std::marker::PhantomData<()>;

#[cfg(feature = "nccl")]
fn device_backend(chosen: Option<CudaBackend>, membership: Membership) -> Box<dyn DeviceBackend> {
    match chosen {
        Some(CudaBackend::Local) => Box::new(crate::backend::device::Staged),
        Some(CudaBackend::Nccl) | None => Box::new(crate::backend::nccl::NcclGroup::new(membership)),
    }
}

/// `with_cuda` has refused what this build does not have.
#[cfg(all(feature = "cuda", not(feature = "nccl")))]
fn device_backend(_chosen: Option<CudaBackend>, _membership: Membership) -> Box<dyn DeviceBackend> {
    Box::new(crate::backend::device::Staged)
}

/// The backend as users get it.
#[cfg(not(feature = "test-faults"))]
fn decorated(backend: Box<dyn Backend>, _group: &str, _rank: Rank) -> Box<dyn Backend> {
    backend
}

/// The backend with a hook for tests.
#[cfg(feature = "test-faults")]
fn decorated(backend: Box<dyn Backend>, group: &str, rank: Rank) -> Box<dyn Backend> {
    Box::new(crate::backend::faulted::Faulted::new(backend, group, rank))
}

impl World {
    fn find(&self, ranks: &[Rank]) -> Option<Arc<Group>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner).get(ranks).cloned()
    }

    fn keep(&self, group: Arc<Group>) {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.insert(Arc::clone(&group.ranks), group);
    }

    /// The name of the next duplicate of a group; its ranks make them together, and so agree on it.
    fn duplicate_name(&self, ranks: &[Rank]) -> String {
        let duplicates = self.duplicates.lock().unwrap_or_else(PoisonError::into_inner);
        let nth = duplicates.iter().filter(|group| *group.ranks == *ranks).count() + 1;
        format!("{}#{nth}", group_name(ranks))
    }

    /// Joins the other ranks of the new group, if there is one; all ranks of the parent call it.
    fn open(
        &self,
        rank: Rank,
        new: Option<(String, Arc<[Rank]>)>,
        invitation: Invitation,
        texts: &[(Rank, String)],
    ) -> Result<Option<Group>> {
        let place = |ranks: &[Rank]| ranks.iter().position(|other| *other == rank).unwrap_or(0);
        let joining = new.as_ref().filter(|(_, ranks)| ranks.len() > 1).map(|(name, ranks)| Membership {
            group: name.clone(),
            ranks: Arc::clone(ranks),
            group_rank: place(ranks),
            timeout: self.options.timeout,
        });
        let opened = match &self.backend {
            Some(backend) => backend.open(joining, invitation, texts)?,
            None => None,
        };
        let Some((name, ranks)) = new else { return Ok(None) };
        let group_rank = GroupRank(place(&ranks));
        let backend = opened.unwrap_or_else(|| Box::new(Solo::new(name.clone(), rank)));
        Ok(Some(Group::new(name, ranks, group_rank, backend)))
    }
}

fn check_rank(rank: Rank, world_size: usize) -> Result<()> {
    if rank.0 < world_size {
        return Ok(());
    }
    Err(Error::InvalidArgument {
        op: "joining the world",
        what: "rank".into(),
        expected: format!("a rank below the world size of {world_size}"),
        got: rank.to_string(),
    })
}

fn membership(rank: Rank, world_size: usize, options: GroupOptions) -> Membership {
    let ranks = (0..world_size).map(Rank).collect();
    Membership { group: "world".into(), ranks, group_rank: rank.0, timeout: options.timeout }
}

fn group_name(ranks: &[Rank]) -> String {
    format!("world{}", list(ranks))
}

/// `[0, 2, 4]`.
fn list(ranks: &[Rank]) -> String {
    format!("{:?}", ranks.iter().map(|rank| rank.0).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests;
