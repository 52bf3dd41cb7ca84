//! A place in an object store: the store, the prefix of its objects' names, and the threads that carry requests.

use std::future::Future;
use std::ops::Range;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode};
use tokio::runtime::{Builder, Runtime};
use tokio::task::AbortHandle;

use super::failure::{self, is_conflict, is_transient};
use crate::{Error, ObjectFailure, Result};

/// How requests are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// The longest that one operation (a part, a range, a small object) may take with all its retries.
    pub timeout: Duration,
    /// How often what failed on the way is tried again, beyond what the store's client does by itself. A refusal is not.
    pub retries: u32,
    /// Length of the parts of an upload and of the ranges that are read, in bytes; rounded up to whole MiB, and as many
    /// more as 10,000 parts ask for. S3 takes no parts under 5 MiB.
    pub part_bytes: usize,
    /// How many parts a rank has under way at a time, and how many ranges it gets ahead: with their lengths, the memory that a
    /// save takes, and half of the most that a load does.
    pub in_flight: usize,
}

impl Default for Options {
    /// Five minutes, 3 retries, 8 parts of 8 MiB.
    fn default() -> Self {
        Self { timeout: Duration::from_secs(300), retries: 3, part_bytes: 8 << 20, in_flight: 8 }
    }
}

/// A checkpoint's place in an object store: all its objects' names begin with it.
///
/// Clones share their threads.
#[derive(Debug, Clone)]
pub struct Prefix {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    /// In messages.
    url: PathBuf,
    options: Options,
    requests: Arc<Requests>,
}

/// The runtime; a field of its own so that it can be dropped wherever the last user is.
#[derive(Debug)]
struct Requests(Option<Runtime>);

/// The delay before the first retry; it doubles with each.
const FIRST_DELAY: Duration = Duration::from_millis(50);

impl Prefix {
    /// The place that a URL names: `s3://bucket/prefix`, `gs://…`, `az://…`, `https://…`, `file:///…`, as in the crate
    /// `object_store`. Settings and credentials come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT`,
    /// `GOOGLE_SERVICE_ACCOUNT`, `AZURE_STORAGE_ACCOUNT_NAME`, …) and from `settings`, under the same names in lower case.
    ///
    /// # Errors
    /// `ObjectStore` for a URL or a setting that is none; `Io` if no threads can be started.
    ///
    /// # Source
    /// `object_store::parse_url_opts`.
    pub fn parse(url: &str, settings: &[(&str, &str)], options: Options) -> Result<Self> {
        let settings = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let all = std::env::vars_os().filter_map(|(key, value)| {
            Some((key.into_string().ok()?.to_ascii_lowercase(), value.into_string().ok()?))
        });
        let parsed = url::Url::parse(url)
            .map_err(|e| object_store::Error::Generic { store: "URL", source: Box::new(e) });
        let parsed = parsed.and_then(|url| object_store::parse_url_opts(&url, all.chain(settings)));
        let (store, prefix) = parsed.map_err(|e| failure::of("open", FilePath::new(url), &e))?;
        Self::build(store.into(), prefix, PathBuf::from(url.trim_end_matches('/')), options)
    }

    /// A place in a store that the caller has set up; empty for all of it.
    ///
    /// # Errors
    /// `ObjectStore` for a prefix that no object can have; `Io` if no threads can be started.
    pub fn new(store: Arc<dyn ObjectStore>, prefix: &str, options: Options) -> Result<Self> {
        let url = PathBuf::from(format!("{store}/{prefix}"));
        let path = Path::parse(prefix).map_err(|e| failure::of("open", &url, &e.into()))?;
        Self::build(store, path, url, options)
    }

    fn build(store: Arc<dyn ObjectStore>, prefix: Path, url: PathBuf, options: Options) -> Result<Self> {
        let mut runtime = Builder::new_multi_thread();
        let runtime = runtime.worker_threads(2).thread_name("sconce-objects").enable_all().build();
        let runtime = runtime.map_err(|e| Error::io("start threads for", &url, &e))?;
        Ok(Self { store, prefix, url, options, requests: Arc::new(Requests(Some(runtime))) })
    }

    /// The place below this one, such as a step's below its run's.
    ///
    /// # Errors
    /// `ObjectStore` for a name that no object can have.
    pub fn child(&self, name: &str) -> Result<Self> {
        let path = format!("{}/{name}", self.prefix);
        let prefix = Path::parse(&path).map_err(|e| failure::of("open", &self.url.join(name), &e.into()))?;
        Ok(Self { prefix, url: self.url.join(name), ..self.clone() })
    }

    /// Its name in messages.
    pub(super) fn url(&self) -> &FilePath {
        &self.url
    }

    pub(super) fn options(&self) -> Options {
        self.options
    }

    pub(super) fn store(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.store)
    }

    /// The name of an object in the store.
    pub(super) fn location(&self, name: &str) -> Path {
        self.prefix.clone().join(name)
    }

    /// The bytes of a range of an object, or of all of it, and its whole length.
    pub(super) fn begin_get(&self, name: &str, range: Option<Range<u64>>) -> Request<(Bytes, u64)> {
        let (store, location) = (self.store(), self.location(name));
        let get = move || {
            let (store, location) = (Arc::clone(&store), location.clone());
            let options = GetOptions { range: range.clone().map(GetRange::Bounded), ..GetOptions::default() };
            async move {
                let found = store.get_opts(&location, options).await?;
                let (len, expected) = (found.meta.size, found.range.end - found.range.start);
                let bytes = found.bytes().await?;
                if bytes.len() as u64 == expected {
                    return Ok((bytes, len));
                }
                let source = format!("{} bytes of {expected} came", bytes.len()).into();
                Err(object_store::Error::Generic { store: "answer", source })
            }
        };
        self.begin("get", name, get)
    }

    /// The length of an object.
    pub(super) fn len_bytes(&self, name: &str) -> Result<u64> {
        let (store, location) = (self.store(), self.location(name));
        let look = async move { store.head(&location).await.map(|found| found.size) };
        self.spawn("look at", name, look).wait()
    }

    /// Puts an object whole, over one that may be there.
    pub(super) fn put(&self, name: &str, bytes: Bytes) -> Result<()> {
        let (store, location) = (self.store(), self.location(name));
        let put = move || {
            let (store, location, bytes) = (Arc::clone(&store), location.clone(), bytes.clone());
            async move { store.put(&location, bytes.into()).await.map(drop) }
        };
        self.begin("put", name, put).wait()
    }

    /// Puts an object whole unless there is one of that name, and says whether it did.
    pub(super) fn create(&self, name: &str, bytes: Bytes) -> Result<bool> {
        let (store, location) = (self.store(), self.location(name));
        let create = move || {
            let (store, location, bytes) = (Arc::clone(&store), location.clone(), bytes.clone());
            async move {
                match store.put_opts(&location, bytes.into(), PutMode::Create.into()).await {
                    Ok(_) => Ok(true),
                    Err(error) if is_conflict(&error) => Ok(false),
                    Err(error) => Err(error),
                }
            }
        };
        self.begin("create", name, create).wait()
    }

    /// Removes an object; one that is not there is removed.
    pub(super) fn delete(&self, name: &str) -> Result<()> {
        let (store, location) = (self.store(), self.location(name));
        let delete = move || {
            let (store, location) = (Arc::clone(&store), location.clone());
            async move { store.delete(&location).await }
        };
        match self.begin("delete", name, delete).wait() {
            Err(Error::ObjectStore { failure: ObjectFailure::NotFound, .. }) => Ok(()),
            other => other,
        }
    }

    /// The names of the objects directly in this place.
    pub(super) fn names(&self) -> Result<Vec<String>> {
        let (store, prefix) = (self.store(), self.prefix.clone());
        let list = move || {
            let (store, prefix) = (Arc::clone(&store), prefix.clone());
            async move { store.list_with_delimiter(Some(&prefix)).await }
        };
        let found = self.begin("list", "", list).wait()?;
        let names = found.objects.iter().filter_map(|object| object.location.filename());
        Ok(names.map(str::to_owned).collect())
    }

    /// Begins an operation on the threads of this place, with retries.
    pub(super) fn begin<T, F>(
        &self,
        op: &'static str,
        name: &str,
        make: impl Fn() -> F + Send + 'static,
    ) -> Request<T>
    where
        T: Send + 'static,
        F: Future<Output = object_store::Result<T>> + Send,
    {
        let retries = self.options.retries;
        self.spawn(op, name, async move {
            let mut nth = 0;
            loop {
                match make().await {
                    Err(error) if nth < retries && is_transient(&error) => {
                        tokio::time::sleep(FIRST_DELAY * 2u32.saturating_pow(nth)).await;
                        nth += 1;
                    }
                    outcome => return outcome,
                }
            }
        })
    }

    /// Begins an operation that cannot be repeated.
    pub(super) fn spawn<T: Send + 'static>(
        &self,
        op: &'static str,
        name: &str,
        operation: impl Future<Output = object_store::Result<T>> + Send + 'static,
    ) -> Request<T> {
        let (send, outcome) = sync_channel(1);
        let Some(runtime) = self.requests.0.as_ref() else {
            unreachable!("the runtime is taken when its last user is dropped");
        };
        let task = runtime.spawn(async move {
            // Whoever asked may have given up.
            let _ = send.send(operation.await);
        });
        let object = if name.is_empty() { self.url.clone() } else { self.url.join(name) };
        let (task, timeout) = (task.abort_handle(), self.options.timeout);
        Request { op, object, outcome, task, deadline: Instant::now() + timeout, timeout }
    }
}

/// An operation under way. Dropped, it is given up.
pub(super) struct Request<T> {
    op: &'static str,
    object: PathBuf,
    outcome: Receiver<object_store::Result<T>>,
    task: AbortHandle,
    deadline: Instant,
    timeout: Duration,
}

impl<T> Request<T> {
    /// Its outcome.
    ///
    /// Waits on this thread, not in a runtime: callers may be in one of their own.
    pub(super) fn wait(self) -> Result<T> {
        let failed = |failure, cause: String| Error::ObjectStore {
            op: self.op.to_owned(),
            object: self.object.clone(),
            failure,
            cause,
        };
        match self.outcome.recv_timeout(self.deadline.saturating_duration_since(Instant::now())) {
            Ok(outcome) => outcome.map_err(|error| failure::of(self.op, &self.object, &error)),
            Err(RecvTimeoutError::Timeout) => {
                Err(failed(ObjectFailure::Timeout, format!("no answer within {:?}", self.timeout)))
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(failed(ObjectFailure::Broken, "the client's thread panicked".to_owned()))
            }
        }
    }
}

impl<T> Drop for Request<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Drop for Requests {
    /// A runtime that is dropped in another one's thread panics, unless it is told to wait for nothing.
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
