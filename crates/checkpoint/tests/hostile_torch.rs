//! Checkpoints of torch and of Hugging Face that somebody made to do harm: each is refused with what was found and where,
//! nothing runs, and nothing is written.

#![cfg(feature = "torch")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: clippy knows it only inside `#[test]` functions"
)]

use std::fs;
use std::path::{Path, PathBuf};

use sconce_checkpoint::{Error, LoadOptions, find_damage, load_new_from, open};
use sconce_dtensor::Value;

/// A record of an archive, and what is wrong with it.
#[derive(Clone, Default)]
struct Entry {
    name: &'static str,
    bytes: Vec<u8>,
    method: u16,
    flags: u16,
    attributes: u32,
    crc: Option<u32>,
    /// Of the central directory, in the place of the real ones.
    offset: Option<u32>,
    len: Option<u32>,
}

fn entry(name: &'static str, bytes: &[u8]) -> Entry {
    Entry { name, bytes: bytes.to_vec(), ..Entry::default() }
}

/// Stored zip records, by the book: headers, a directory, an end.
fn zip(entries: &[Entry]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for e in entries {
        let offset = e.offset.unwrap_or(out.len() as u32);
        let fields = |out: &mut Vec<u8>, len: u32| {
            for field in [e.flags, e.method, 0, 0] {
                out.extend_from_slice(&field.to_le_bytes());
            }
            for field in [e.crc.unwrap_or_else(|| crc32fast::hash(&e.bytes)), len, len] {
                out.extend_from_slice(&field.to_le_bytes());
            }
            out.extend_from_slice(&(e.name.len() as u16).to_le_bytes());
            out.extend_from_slice(&[0; 2]);
        };
        out.extend_from_slice(b"PK\x03\x04\x14\x00");
        fields(&mut out, e.bytes.len() as u32);
        out.extend_from_slice(e.name.as_bytes());
        out.extend_from_slice(&e.bytes);
        directory.extend_from_slice(b"PK\x01\x02\x14\x03\x14\x00");
        fields(&mut directory, e.len.unwrap_or(e.bytes.len() as u32));
        directory.extend_from_slice(&[0; 6]);
        directory.extend_from_slice(&e.attributes.to_le_bytes());
        directory.extend_from_slice(&offset.to_le_bytes());
        directory.extend_from_slice(e.name.as_bytes());
    }
    let (start, count) = (out.len() as u32, entries.len() as u16);
    out.extend_from_slice(&directory);
    out.extend_from_slice(b"PK\x05\x06\0\0\0\0");
    out.extend_from_slice(&count.to_le_bytes());
    out.extend_from_slice(&count.to_le_bytes());
    out.extend_from_slice(&(directory.len() as u32).to_le_bytes());
    out.extend_from_slice(&start.to_le_bytes());
    out.extend_from_slice(&[0; 2]);
    out
}

/// What `torch.save` makes of a pickle.
fn saved(pickle: &[u8]) -> Vec<Entry> {
    vec![entry("a/data.pkl", pickle), entry("a/byteorder", b"little"), entry("a/data/0", &[0; 8])]
}

/// `{"x": value}`, where `value` are opcodes.
fn dict(value: &[u8]) -> Vec<u8> {
    [&b"\x80\x02}X\x01\x00\x00\x00x"[..], value, b"s."].concat()
}

/// A tensor of the storage of two floats: the opcodes of its size and stride are given.
fn tensor(size: &[u8], stride: &[u8]) -> Vec<u8> {
    let storage = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQK\x00";
    [&storage[..], size, b"\x85", stride, b"\x85", b"\x89ccollections\nOrderedDict\n)RtR"].concat()
}

/// Opening what is at `path` fails; how.
#[track_caller]
fn failure(path: &Path) -> Error {
    let loaded = open(path).and_then(|reader| load_new_from(reader.as_ref(), LoadOptions::default()));
    loaded.map(|state| state.iter().count()).unwrap_err()
}

#[track_caller]
fn refused_file(bytes: &[u8], words: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file.pt");
    fs::write(&path, bytes).unwrap();
    let error = failure(&path);
    let told = error.to_string();
    assert!(matches!(error, Error::Refused { .. } | Error::Corrupt { .. }), "{told}");
    assert!(words.iter().all(|word| told.contains(word)) && told.contains("file.pt"), "{words:?}: {told}");
    assert!(told.len() < 1000, "{told:.2000}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "something was written");
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/fixtures/torch").join(name).join("checkpoint")
}

/// A copy of a checkpoint that torch wrote, to be made worse.
fn copy_of(name: &str, dir: &Path) -> PathBuf {
    let to = dir.join("checkpoint");
    fs::create_dir(&to).unwrap();
    for file in fs::read_dir(fixture(name)).unwrap() {
        let file = file.unwrap().path();
        if file.is_file() {
            fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
        }
    }
    to
}

fn replace(path: &Path, from: &[u8], to: &[u8]) {
    let bytes = fs::read(path).unwrap();
    let (mut out, mut at, mut count) = (Vec::new(), 0, 0);
    while at < bytes.len() {
        if bytes[at..].starts_with(from) {
            out.extend_from_slice(to);
            at += from.len();
            count += 1;
        } else {
            out.push(bytes[at]);
            at += 1;
        }
    }
    assert!(count > 0, "{}: nothing to replace", path.display());
    fs::write(path, out).unwrap();
}

#[test]
fn a_pickle_that_calls_the_shell_is_refused_by_name_wherever_it_is_and_never_runs() {
    let dir = tempfile::tempdir().unwrap();
    let canary = dir.path().join("ran");
    let shell = format!("touch {}", canary.display());
    for module in ["os\nsystem", "posix\nsystem", "builtins\nexec", "subprocess\nPopen"] {
        let call = [
            format!("c{module}\n").as_bytes(),
            b"X",
            &(shell.len() as u32).to_le_bytes()[..],
            shell.as_bytes(),
            b"\x85R",
        ]
        .concat();
        let name = module.replace('\n', ".");
        refused_file(&zip(&saved(&dict(&call))), &[&name, "not on the list"]);
        // The same in the metadata of a distributed checkpoint.
        let path = dir.path().join(&name);
        fs::create_dir(&path).unwrap();
        fs::write(path.join(".metadata"), [&b"\x80\x02"[..], &call, b"."].concat()).unwrap();
        let told = failure(&path).to_string();
        assert!(told.contains(&name) && told.contains(".metadata"), "{told}");
    }
    assert!(!canary.exists(), "the pickle ran");
}

#[test]
fn values_nested_too_deep_and_values_in_a_circle_are_refused() {
    let mut deep = vec![b']'; 20_000];
    deep.extend(vec![b'a'; 19_999]);
    refused_file(&zip(&saved(&dict(&deep))), &["nested more than"]);
    // l = []; l.append(l)
    refused_file(&zip(&saved(&dict(b"]q\x00h\x00a"))), &["nested more than"]);
}

#[test]
fn values_that_multiply_through_the_memo_are_refused() {
    // Each list holds the one before it ten times.
    let mut bomb = b"](NNNNNNNNNNeq\x00".to_vec();
    for nth in 0..20u8 {
        bomb.extend_from_slice(b"0](");
        (0..10).for_each(|_| bomb.extend_from_slice(&[b'h', nth]));
        bomb.extend_from_slice(&[b'e', b'q', nth + 1]);
    }
    refused_file(&zip(&saved(&dict(&bomb))), &["repeat each other"]);
    // A long text ten thousand times.
    let mut bomb = b"X\x00\x00\x10\x00".to_vec();
    bomb.extend(vec![b'y'; 1 << 20]);
    bomb.extend_from_slice(b"q\x000](");
    (0..10_000).for_each(|_| bomb.extend_from_slice(b"h\x00"));
    bomb.push(b'e');
    refused_file(&zip(&saved(&dict(&bomb))), &["repeat each other"]);
    // And as the key of a dict in a list, again and again.
    let mut bomb = b"X\x00\x00\x10\x00".to_vec();
    bomb.extend(vec![b'y'; 1 << 20]);
    bomb.extend_from_slice(b"q\x000](");
    (0..10_000).for_each(|_| bomb.extend_from_slice(b"}h\x00Ns"));
    bomb.push(b'e');
    refused_file(&zip(&saved(&dict(&bomb))), &["repeat each other"]);
    refused_file(&zip(&saved(&vec![b']'; 3 << 20])), &["more containers"]);
}

#[test]
fn lengths_that_lie_are_found_out() {
    refused_file(&zip(&saved(&dict(b"X\xff\xff\xff\x7fabc"))), &["are left"]);
    // A tensor of more elements than its storage: (2^40,) of a storage of 8 bytes.
    assert_eq!(load_ok(&zip(&saved(&dict(&tensor(b"K\x02", b"K\x01"))))), 1);
    let huge = b"\x8a\x06\x00\x00\x00\x00\x00\x01";
    refused_file(&zip(&saved(&dict(&tensor(huge, b"K\x01")))), &["larger than its storage"]);
    refused_file(&zip(&saved(&dict(&tensor(huge, b"K\x00")))), &["larger than its storage"]);
    refused_file(&zip(&saved(&dict(&tensor(b"K\x02", huge)))), &["larger than its storage"]);
    refused_file(&zip(&saved(&dict(&tensor(b"K\x02", b"J\xff\xff\xff\xff")))), &["other arguments"]);
    // A record longer than the archive.
    let mut entries = saved(&dict(b"N"));
    entries[2].len = Some(u32::MAX - 1);
    refused_file(&zip(&entries), &["a/data/0"]);
    let whole = zip(&saved(&dict(b"N")));
    refused_file(&whole[..whole.len() - 30], &["file.pt"]);
}

fn load_ok(bytes: &[u8]) -> usize {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file.pt");
    fs::write(&path, bytes).unwrap();
    let state = load_new_from(open(&path).unwrap().as_ref(), LoadOptions::default()).unwrap();
    state.iter().count()
}

#[test]
fn zip_records_that_overlap_leave_link_or_are_not_stored_are_refused() {
    let good = saved(&dict(b"N"));
    assert_eq!(load_ok(&zip(&good)), 1);
    let with = |nth: usize, change: &dyn Fn(&mut Entry)| {
        let mut entries = good.clone();
        change(&mut entries[nth]);
        zip(&entries)
    };
    let mut overlapping = good.clone();
    overlapping.push(Entry { offset: Some(0), ..good[0].clone() });
    refused_file(&zip(&overlapping), &["overlap"]);
    let mut twice = good.clone();
    twice.push(good[0].clone());
    refused_file(&zip(&twice), &["one name"]);
    refused_file(&with(2, &|e| e.offset = Some(0)), &["a/data/0"]);
    refused_file(&with(2, &|e| e.name = "../data/0"), &["../data/0", "leaves the archive"]);
    refused_file(&with(2, &|e| e.name = "/etc/passwd"), &["/etc/passwd", "leaves the archive"]);
    refused_file(&with(2, &|e| e.method = 8), &["a/data/0", "compressed"]);
    refused_file(&with(2, &|e| e.flags = 1), &["a/data/0", "encrypted"]);
    refused_file(&with(2, &|e| e.attributes = 0o120_777 << 16), &["a/data/0", "symbolic link"]);
    refused_file(&with(1, &|e| e.bytes = b"big".to_vec()), &["byte order", "big"]);
    refused_file(b"PK\x03\x04 and nothing else", &["file.pt"]);
    refused_file(b"neither this nor that", &["file.pt"]);
    refused_file(b"", &["file.pt"]);
}

#[test]
fn names_of_files_that_leave_the_directory_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = copy_of("interop/nested", dir.path());
    for name in ["../_0.distcp", "/tmp/0.distc", "a/b/0.distcp"] {
        let path = copy_of("interop/nested", &tempdir_in(dir.path()));
        replace(&path.join(".metadata"), b"__0_0.distcp", name.as_bytes());
        let told = failure(&path).to_string();
        assert!(told.contains(name) && told.contains("directory"), "{told}");
    }
    assert!(open(&path).is_ok());
    let path = copy_of("interop/hf_indexed", &tempdir_in(dir.path()));
    replace(&path.join("model.safetensors.index.json"), b"model-00001-of-00002", b"../../../../../../00");
    let told = failure(&path).to_string();
    assert!(told.contains("../../") && told.contains("directory"), "{told}");
}

fn tempdir_in(dir: &Path) -> PathBuf {
    tempfile::tempdir_in(dir).unwrap().keep()
}

#[test]
fn links_in_the_place_of_torchs_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for name in [".metadata", "__0_0.distcp"] {
        let path = copy_of("interop/nested", &tempdir_in(dir.path()));
        let elsewhere = dir.path().join("elsewhere");
        fs::rename(path.join(name), &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, path.join(name)).unwrap();
        let told = failure(&path).to_string();
        assert!(told.contains(name) && told.contains("symbolic link"), "{told}");
    }
}

#[test]
fn pipes_in_the_place_of_files_are_refused_and_nobody_waits() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    let dir = tempfile::tempdir().unwrap();
    for (case, name) in [
        ("interop/nested", ".metadata"),
        ("interop/nested", "__0_0.distcp"),
        ("interop/hf_indexed", "model-00001-of-00002.safetensors"),
        ("interop/hf_indexed", "model.safetensors.index.json"),
    ] {
        let path = copy_of(case, &tempdir_in(dir.path()));
        fs::remove_file(path.join(name)).unwrap();
        mknodat(CWD, path.join(name), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let told = failure(&path).to_string();
        assert!(told.contains(name) && told.contains("regular file"), "{told}");
    }
}

#[test]
fn directories_of_another_kind_are_no_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let told = failure(dir.path()).to_string();
    assert!(told.contains("not a checkpoint") && told.contains("manifest.sconce"), "{told}");
    fs::write(dir.path().join("README.md"), "# A project").unwrap();
    fs::create_dir(dir.path().join("src")).unwrap();
    assert!(matches!(failure(dir.path()), Error::NotACheckpoint { .. }));
    // Files that are called as torch's are, and are something else.
    fs::write(dir.path().join(".metadata"), "{\"kind\": \"podcast\"}").unwrap();
    let told = failure(dir.path()).to_string();
    assert!(told.contains(".metadata"), "{told}");
    fs::remove_file(dir.path().join(".metadata")).unwrap();
    fs::write(dir.path().join("model.safetensors"), "<html>rate limited</html>").unwrap();
    let told = failure(dir.path()).to_string();
    assert!(told.contains("model.safetensors"), "{told}");
    assert!(matches!(failure(&dir.path().join("nowhere")), Error::Missing { .. }));
}

#[test]
fn keys_that_only_their_kinds_tell_apart_are_refused() {
    let value = dict(b"}(K\x01K\x05X\x01\x00\x00\x001K\x06u");
    refused_file(&zip(&saved(&value)), &["two keys", "\"1\""]);
    // One key twice is one key in Python too.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file.pt");
    fs::write(&path, zip(&saved(&dict(b"}(K\x01K\x05K\x01K\x06u")))).unwrap();
    let state = load_new_from(open(&path).unwrap().as_ref(), LoadOptions::default()).unwrap();
    let Some(Value::Map(inner)) = state.get("x") else { panic!("no map") };
    assert_eq!(inner.get("1").and_then(|value| value.as_int()), Some(6));
}

/// `torch.serialization.set_crc32_options(False)` leaves zeros.
#[test]
fn archives_without_checksums_are_not_compared_with_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file.pt");
    let mut entries = saved(&dict(b"K\x05"));
    fs::write(&path, zip(&entries)).unwrap();
    assert!(find_damage(&path, 1, &|_| {}).unwrap().checked_bytes > 0);
    entries.iter_mut().for_each(|entry| entry.crc = Some(0));
    fs::write(&path, zip(&entries)).unwrap();
    let report = find_damage(&path, 1, &|_| {}).unwrap();
    assert_eq!((report.n_files, report.checked_bytes, report.damages), (1, 0, vec![]));
}

#[test]
fn classes_that_are_not_on_the_list_do_no_harm_to_who_wants_tensors_alone() {
    let tensor = tensor(b"K\x02", b"K\x01");
    let name = |text: &[u8]| [b"X", &(text.len() as u32).to_le_bytes()[..], text].concat();
    // An instance with items, entries and a state; a call of what a call returned, with keyword arguments; a member.
    let odd: [&[u8]; 3] = [
        b"cargparse\nNamespace\n)\x81(K\x01K\x02e(K\x01K\x02u}b",
        b"cos\nsystem\nX\x02\x00\x00\x00ls\x85R)}\x92",
        b"cbuiltins\ngetattr\ncmine\nEnum\nX\x01\x00\x00\x00A\x86R",
    ];
    for odd in odd {
        let value = [&b"}("[..], &name(b"odd"), odd, &name(b"w"), &tensor, &name(b"n"), b"K\x05u"].concat();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file.pt");
        fs::write(&path, zip(&saved(&dict(&value)))).unwrap();
        assert!(matches!(failure(&path), Error::Refused { .. }));
        let reader = sconce_checkpoint::torch::PtReader::tensors_only(&path);
        let state = load_new_from(&reader, LoadOptions::default()).unwrap();
        let Some(Value::Map(inner)) = state.get("x") else { panic!("no map") };
        assert_eq!(inner.iter().map(|(key, _)| key).collect::<Vec<_>>(), ["w"]);
    }
}
