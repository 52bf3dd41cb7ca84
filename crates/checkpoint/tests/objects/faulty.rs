//! A store in memory that fails on demand, and counts what is asked of it.

use std::fmt::{self, Display};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use sconce_checkpoint::object::object_store::memory::InMemory;
use sconce_checkpoint::object::object_store::path::Path;
use sconce_checkpoint::object::object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

/// What fails. Only objects whose name contains a text fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A put, before anything is stored.
    Put,
    /// A put that is stored, but whose answer is lost.
    PutAnswer,
    /// The second part of an upload.
    Part,
    /// The end of an upload.
    Complete,
    /// A get, whose answer breaks off with an error.
    GetBroken,
    /// A get, whose answer ends too early without one.
    GetShort,
    /// A get that never answers.
    GetSilent,
    /// A get of somebody without rights.
    GetDenied,
}

/// What is to fail, where, and how many times more.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) fault: Fault,
    pub(crate) object: &'static str,
    pub(crate) times: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Faulty {
    inner: InMemory,
    plan: Mutex<Option<Plan>>,
    pub(crate) gets: AtomicUsize,
    pub(crate) got_bytes: AtomicUsize,
}

impl Faulty {
    pub(crate) fn set(&self, plan: Option<Plan>) {
        *self.plan.lock().unwrap() = plan;
    }

    /// Whether it fails now.
    fn fails(&self, fault: Fault, object: &Path) -> bool {
        let mut plan = self.plan.lock().unwrap();
        let plan = plan.as_mut().filter(|plan| plan.fault == fault && object.as_ref().contains(plan.object));
        let Some(plan) = plan.filter(|plan| plan.times > 0) else { return false };
        plan.times -= 1;
        true
    }

    fn has_fault(&self, fault: Fault) -> bool {
        self.plan.lock().unwrap().is_some_and(|plan| plan.fault == fault && plan.times > 0)
    }
}

fn broken(what: &str) -> Error {
    Error::Generic { store: "Faulty", source: what.to_owned().into() }
}

impl Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, at: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        if self.fails(Fault::Put, at) {
            return Err(broken("the put broke"));
        }
        let put = self.inner.put_opts(at, payload, options).await?;
        if self.fails(Fault::PutAnswer, at) { Err(broken("the answer was lost")) } else { Ok(put) }
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let inner = self.inner.put_multipart_opts(at, options).await?;
        // Decided once: an upload that is begun anew is another one.
        let part = self.has_fault(Fault::Part) && self.fails(Fault::Part, at);
        let complete = self.has_fault(Fault::Complete) && self.fails(Fault::Complete, at);
        Ok(Box::new(Upload { inner, n_parts: 0, part, complete }))
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        if self.fails(Fault::GetSilent, at) {
            std::future::pending::<()>().await;
        }
        if self.fails(Fault::GetDenied, at) {
            return Err(Error::PermissionDenied { path: at.to_string(), source: "not yours".into() });
        }
        let mut found = self.inner.get_opts(at, options).await?;
        self.gets.fetch_add(1, Ordering::Relaxed);
        self.got_bytes.fetch_add((found.range.end - found.range.start) as usize, Ordering::Relaxed);
        let (is_broken, is_short) = (self.fails(Fault::GetBroken, at), self.fails(Fault::GetShort, at));
        if is_broken || is_short {
            let range = found.range.clone();
            let bytes = found.bytes().await?;
            let half = stream::iter([Ok(bytes.slice(..bytes.len() / 2))]);
            let end = stream::iter(is_broken.then(|| Err(broken("the connection broke"))));
            found = self.inner.get_opts(at, GetOptions::default()).await?;
            found.range = range;
            found.payload = GetResultPayload::Stream(half.chain(end).boxed());
        }
        Ok(found)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct Upload {
    inner: Box<dyn MultipartUpload>,
    n_parts: usize,
    part: bool,
    complete: bool,
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.n_parts += 1;
        if self.part && self.n_parts == 2 {
            return Box::pin(async { Err(broken("the part broke")) });
        }
        self.inner.put_part(data)
    }

    async fn complete(&mut self) -> Result<PutResult> {
        if self.complete { Err(broken("the end broke")) } else { self.inner.complete().await }
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}
