//! A server that speaks S3, a program of others, on this host: requests are signed, parts are parts, ranges are ranges.
//!
//! `cargo xtask s3-test` installs the server and runs this.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sconce_checkpoint::object::object_store::ObjectStore;
use sconce_checkpoint::object::object_store::aws::AmazonS3Builder;
use sconce_checkpoint::object::{Options, Prefix, Reader, Writer};
use sconce_checkpoint::{Error, ObjectFailure, StorageReader};

use crate::saved::{columns, load_on, loaded_step, options, place, rows, save_on};

const KEY: &str = "sconce";
const SECRET: &str = "a secret of this test";
const BUCKET: &str = "checkpoints";

/// A server that ends with this value.
struct Server {
    process: Child,
    url: String,
}

impl Server {
    /// Starts the program that `SCONCE_S3_SERVER` names, with its objects in `dir`.
    fn start(dir: &Path) -> Self {
        let program = std::env::var_os("SCONCE_S3_SERVER").expect("SCONCE_S3_SERVER is the path of s3s-fs");
        std::fs::create_dir_all(dir.join(BUCKET)).unwrap();
        let mut command = Command::new(program);
        command.args(["--host", "127.0.0.1", "--port", "0", "--access-key", KEY, "--secret-key", SECRET]);
        command.arg(dir).env("RUST_LOG", "info").env("NO_COLOR", "1").stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let (send, url) = std::sync::mpsc::channel();
        // Reads on to the end, so that the server can go on writing.
        std::thread::spawn(move || {
            while let Some(Ok(line)) = lines.next() {
                if let Some((_, url)) = line.split_once("server is running at ") {
                    let url: String = url.chars().take_while(|c| c.is_ascii_graphic()).collect();
                    let _ = send.send(url);
                }
            }
        });
        let url = url.recv_timeout(Duration::from_secs(30)).expect("the server says where it listens");
        Self { process, url }
    }

    fn store(&self, secret: &str) -> Arc<dyn ObjectStore> {
        let builder = AmazonS3Builder::new().with_endpoint(&self.url).with_allow_http(true);
        let builder = builder.with_region("us-east-1").with_bucket_name(BUCKET);
        Arc::new(builder.with_access_key_id(KEY).with_secret_access_key(secret).build().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
#[ignore = "needs a server that speaks S3: cargo xtask s3-test"]
fn a_server_that_speaks_s3_keeps_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let store = server.store(SECRET);
    crate::stores::check(&place(&store, "runs/a/step-000100", options()));

    // The same place by its URL.
    let settings = [
        ("aws_endpoint", server.url.as_str()),
        ("aws_access_key_id", KEY),
        ("aws_secret_access_key", SECRET),
        ("aws_region", "us-east-1"),
        ("aws_allow_http", "true"),
    ];
    let url = format!("s3://{BUCKET}/runs/a/step-000100");
    let named = Prefix::parse(&url, &settings, options()).unwrap();
    assert_eq!(loaded_step(&named), 9);
    load_on(4, 9, columns, |_| Reader::new(named.clone())).into_iter().for_each(|got| drop(got.unwrap()));

    // Others' credentials.
    let foreign = place(&server.store("guessed"), "runs/a/step-000100", options());
    let refused = Reader::new(foreign.clone()).read_metadata().unwrap_err();
    let is_denied = matches!(&refused, Error::ObjectStore { failure: ObjectFailure::Denied, .. });
    assert!(is_denied && refused.to_string().contains("manifest.sconce"), "{refused}");
    for saved in save_on(2, 1, |_| Writer::new(foreign.clone(), true)) {
        let error = saved.unwrap_err();
        assert!(error.to_string().contains("manifest.sconce"), "{error}");
    }
    assert_eq!(loaded_step(&named), 9);
}

#[test]
#[ignore = "needs a server that speaks S3: cargo xtask s3-test"]
fn a_server_that_dies_during_a_save_leaves_the_checkpoint_before() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path());
    let quick = Options { timeout: Duration::from_secs(5), retries: 0, ..options() };
    let runs = place(&server.store(SECRET), "runs/a", quick);
    save_on(2, 1, |_| Writer::new(runs.clone(), true)).into_iter().for_each(|saved| {
        saved.unwrap();
    });
    assert_eq!(loaded_step(&runs), 1);
    let started = Instant::now();
    let outcomes = std::thread::scope(|scope| {
        let saving = scope.spawn(|| save_on(2, 2, |_| Writer::new(runs.clone(), true)));
        // At a moment that differs from run to run; at any of them the old checkpoint is whole, or the new one is.
        std::thread::sleep(Duration::from_millis(u64::from(std::process::id() % 40)));
        server.process.kill().unwrap();
        saving.join().unwrap()
    });
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    let saved = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    assert!(saved == 0 || saved == 2, "{outcomes:?}");
    let again = Server::start(dir.path());
    let runs = place(&again.store(SECRET), "runs/a", options());
    let step = loaded_step(&runs);
    assert!(step == 2 || (saved == 0 && step == 1), "step {step} after {outcomes:?}");
    load_on(2, step, rows, |_| Reader::new(runs.clone())).into_iter().for_each(|got| drop(got.unwrap()));
}
