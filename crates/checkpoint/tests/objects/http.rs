//! A directory that a plain HTTP server serves is read where it lies.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use sconce_checkpoint::object::{Prefix, Reader};
use sconce_checkpoint::{Error, SaveOptions, StorageReader, save_with};
use sconce_mesh::ProcessGroup;

use crate::common::ranks;
use crate::saved::{columns, held, load_on, loaded_step, options, rows};

/// Answers GETs of files below a directory, with ranges, one request a connection; cuts the first `n_cut` of them short.
fn serve(listener: &TcpListener, dir: &Path, n_cut: &AtomicUsize) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        // A client that goes away is none of our business.
        let _ = answer(stream, dir, n_cut);
    }
}

fn answer(mut stream: TcpStream, dir: &Path, n_cut: &AtomicUsize) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    let mut range = None;
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if let Some(bytes) = line.strip_prefix("range: bytes=") {
            range = bytes.split_once('-').map(|(a, b)| (a.parse().unwrap(), b.parse::<usize>().unwrap() + 1));
        }
        if line.is_empty() {
            break;
        }
    }
    let name = request.split(' ').nth(1).unwrap_or("/").trim_start_matches('/');
    let Ok(bytes) = fs::read(dir.join(name)) else {
        return stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    let (start, end) =
        range.map_or((0, bytes.len()), |(start, end): (usize, usize)| (start, end.min(bytes.len())));
    let status = if range.is_some() { "206 Partial Content" } else { "200 OK" };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{}\r\nETag: \"1\"\r\n\
         Last-Modified: Wed, 25 Nov 2026 00:00:00 GMT\r\nConnection: close\r\n\r\n",
        end - start,
        end.saturating_sub(1),
        bytes.len()
    );
    stream.write_all(head.as_bytes())?;
    let is_cut = end - start > 1 << 20
        && n_cut.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok();
    let sent = if is_cut { (start + end) / 2 } else { end };
    if request.starts_with("GET") { stream.write_all(&bytes[start..sent]) } else { Ok(()) }
}

/// Runs `body` with the URL of a server of `dir`.
fn with_server(dir: &Path, n_cut: usize, body: impl FnOnce(&str)) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (dir, n_cut) = (dir.to_owned(), AtomicUsize::new(n_cut));
    // It ends with the test's process.
    std::thread::spawn(move || serve(&listener, &dir, &n_cut));
    body(&url);
}

fn saved(dir: &Path) {
    let save = |group: ProcessGroup| {
        let options = SaveOptions { group: Some(&group), ..SaveOptions::default() };
        save_with(dir.join("c"), &held(&rows(3, group.rank().0), 6, true), options).map(drop)
    };
    ranks(3, save).into_iter().for_each(|saved| saved.unwrap());
}

#[test]
fn a_directory_behind_a_server_is_loaded_under_any_layout_though_answers_break_off() {
    let dir = tempfile::tempdir().unwrap();
    saved(dir.path());
    for n_cut in [0, 2] {
        with_server(dir.path(), n_cut, |url| {
            let settings = [("allow_http", "true")];
            let place = Prefix::parse(&format!("{url}/c"), &settings, options()).unwrap();
            load_on(2, 6, columns, |_| Reader::new(place.clone()))
                .into_iter()
                .for_each(|got| drop(got.unwrap()));
            assert_eq!(loaded_step(&place), 6);
        });
    }
}

#[test]
fn what_a_server_does_not_have_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    saved(dir.path());
    let file =
        Reader::new(Prefix::parse(&format!("file://{}/c", dir.path().display()), &[], options()).unwrap());
    let file = file.read_metadata().unwrap().files[0].name.clone();
    fs::remove_file(dir.path().join("c").join(&file)).unwrap();
    with_server(dir.path(), 0, |url| {
        let place =
            |at: &str| Prefix::parse(&format!("{url}/{at}"), &[("allow_http", "true")], options()).unwrap();
        assert!(matches!(Reader::new(place("nothing")).read_metadata(), Err(Error::Missing { .. })));
        for outcome in load_on(2, 6, columns, |_| Reader::new(place("c"))) {
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains(&file) && error.contains("404"), "{error}");
        }
    });
}
