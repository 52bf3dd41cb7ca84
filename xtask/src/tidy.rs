//! The rules of this repository that a machine can check. Each is a pure function from a file's text to complaints.

use std::path::{Path, PathBuf};

use crate::root;

/// The only files with unsafe code.
const UNSAFE_FILES: [&str; 7] = [
    "crates/mesh/src/backend/local/copy.rs",
    "crates/mesh/src/backend/local/ffi.rs",
    "crates/mesh/src/backend/mpi/ffi.rs",
    "crates/mesh/src/backend/nccl/ffi.rs",
    "crates/mesh/src/cuda/ffi.rs",
    "crates/checkpoint/src/storage/mmap.rs",
    "crates/testkit/src/alloc.rs",
];

/// Files of sconce-dtensor that only compute: no group, no file, no clock.
const PURE_FILES: [&str; 9] = [
    "crates/dtensor/src/boxes.rs",
    "crates/dtensor/src/ops/rules.rs",
    "crates/dtensor/src/placement.rs",
    "crates/dtensor/src/redistribute/box_index.rs",
    "crates/dtensor/src/redistribute/exchange.rs",
    "crates/dtensor/src/redistribute/geometry.rs",
    "crates/dtensor/src/redistribute/plan.rs",
    "crates/dtensor/src/redistribute/step.rs",
    "crates/dtensor/src/shard_math.rs",
];

/// What a pure file does not name.
const IMPURE: [&str; 7] =
    ["ProcessGroup", "mesh_group", "std::fs", "std::io", "std::net", "std::time", "std::env"];

const MAX_FILE_LINES: usize = 700;
const MAX_FUNCTION_LINES: usize = 80;
const MAX_README_LINES: usize = 120;

/// Checks every Rust file, the crates' independence and the README.
pub(crate) fn run() -> Result<(), String> {
    let complaints = complaints()?;
    if complaints.is_empty() {
        println!("tidy: clean");
        return Ok(());
    }
    Err(format!("{} complaints\n{}", complaints.len(), complaints.join("\n")))
}

fn complaints() -> Result<Vec<String>, String> {
    let mut files = Vec::new();
    for dir in ["crates", "xtask"] {
        rust_files(&root().join(dir), &mut files)?;
    }
    files.sort();
    let mut complaints = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        let name = file.strip_prefix(root()).unwrap_or(&file).display().to_string();
        complaints.extend(check_file(&name, &text).into_iter().map(|what| format!("{name}: {what}")));
    }
    let readme = std::fs::read_to_string(root().join("README.md")).map_err(|e| format!("README.md: {e}"))?;
    if readme.lines().count() > MAX_README_LINES {
        complaints.push(format!("README.md: over {MAX_README_LINES} lines"));
    }
    Ok(complaints)
}

fn rust_files(dir: &Path, files: &mut Vec<PathBuf>) -> Result<(), String> {
    for entry in std::fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))? {
        let path = entry.map_err(|e| e.to_string())?.path();
        // Of the peers, which are no part of the workspace.
        let is_build = path.file_name().is_some_and(|name| name == "target");
        if path.is_dir() && !is_build {
            rust_files(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

fn check_file(name: &str, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    if !text.starts_with("//!") {
        complaints.push("does not begin by saying what it is for (`//!`)".to_owned());
    }
    if text.lines().count() > MAX_FILE_LINES {
        complaints.push(format!("over {MAX_FILE_LINES} lines"));
    }
    complaints.extend(long_functions(text));
    complaints.extend(unnumbered_todos(text));
    if name.contains("/src/") {
        complaints.extend(check_unsafe(name, text));
    }
    if PURE_FILES.contains(&name) {
        let code: String = text.split("#[cfg(test)]").take(1).collect();
        let named =
            IMPURE.iter().filter(|word| code.lines().any(|line| !is_comment(line) && line.contains(**word)));
        complaints.extend(named.map(|word| format!("names {word}: this file only computes")));
    }
    for (crate_dir, other) in
        [("crates/fsdp/src/", "sconce_checkpoint"), ("crates/checkpoint/src/", "sconce_fsdp")]
    {
        if name.starts_with(crate_dir) && text.contains(other) {
            complaints.push(format!("names {other}: fsdp and checkpoint never name each other"));
        }
    }
    complaints
}

fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with("//")
}

/// Functions over the limit, on text that rustfmt formatted: one ends at a brace indented as it began.
fn long_functions(text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let mut complaints = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let indent = line.len() - code.len();
        let words: Vec<&str> = code.split([' ', '(', '<']).take(5).collect();
        if code.starts_with("//") || !words.contains(&"fn") || code.ends_with([';', '}']) {
            continue;
        }
        // A signature over several lines may end without a body, as in a trait.
        let is_end = |line: &str| {
            line.len() == indent + 1 && line.ends_with('}')
                || code.ends_with('(')
                    && line.get(indent..).is_some_and(|l| l.starts_with(')'))
                    && line.ends_with(';')
        };
        let end = (start..lines.len()).find(|n| is_end(lines[*n]));
        let len = end.map_or(0, |end| end - start + 1);
        if len > MAX_FUNCTION_LINES {
            complaints.push(format!("line {}: a function of {len} lines", start + 1));
        }
    }
    complaints
}

fn unnumbered_todos(text: &str) -> Vec<String> {
    let marks = ["TODO", "FIXME", "XXX"].map(|mark| (format!("// {mark}"), format!("// {mark}(#")));
    let mut complaints = Vec::new();
    for (nth, line) in text.lines().enumerate() {
        if marks
            .iter()
            .any(|(mark, numbered)| line.contains(mark.as_str()) && !line.contains(numbered.as_str()))
        {
            complaints.push(format!("line {}: a note for later without an issue number", nth + 1));
        }
    }
    complaints
}

fn check_unsafe(name: &str, text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let is_unsafe = |line: &str| {
        let code = line.split("//").next().unwrap_or_default();
        ["unsafe {", "unsafe impl", "unsafe fn"].iter().any(|word| code.contains(word)) && !code.contains('"')
    };
    let used: Vec<usize> = (0..lines.len()).filter(|nth| is_unsafe(lines[*nth])).collect();
    if !used.is_empty() && !UNSAFE_FILES.contains(&name) {
        return vec![format!("line {}: unsafe code; it belongs in {UNSAFE_FILES:?}", used[0] + 1)];
    }
    let justified = |nth: usize| {
        let before = lines[..nth].iter().rev().take(12);
        before
            .map(|line| line.trim_start())
            .any(|line| line.starts_with("// SAFETY:") || line == "/// # Safety")
    };
    let unjustified = used.into_iter().filter(|nth| !justified(*nth));
    unjustified.map(|nth| format!("line {}: unsafe without a `// SAFETY:` above it", nth + 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_repository_is_tidy() {
        assert_eq!(complaints().unwrap(), Vec::<String>::new());
    }

    #[test]
    fn each_rule_finds_what_it_forbids() {
        let long = format!("//! x\nfn f() {{\n{}}}\n", "    g();\n".repeat(MAX_FUNCTION_LINES));
        assert_eq!(long_functions(&long), ["line 2: a function of 82 lines"]);
        let without_body =
            format!("//! x\ntrait T {{\n    fn f(\n        &self,\n    ) -> u8;\n{}}}\n", "\n".repeat(90));
        assert_eq!(long_functions(&without_body).len(), 0);
        let word = ["//", "TODO"].join(" ");
        assert_eq!(unnumbered_todos(&format!("{word}: later")).len(), 1);
        assert_eq!(unnumbered_todos(&format!("{word}(#7): later")).len(), 0);
        let danger = ["unsafe", "{ x() }"].join(" ");
        assert_eq!(check_unsafe("crates/fsdp/src/a.rs", &danger).len(), 1);
        assert_eq!(check_unsafe(UNSAFE_FILES[0], &danger).len(), 1);
        assert_eq!(check_unsafe(UNSAFE_FILES[0], &format!("// SAFETY: x\n{danger}")).len(), 0);
        assert_eq!(check_file("crates/fsdp/src/a.rs", "//! x\nuse sconce_checkpoint::save;").len(), 1);
        assert_eq!(check_file("a.rs", "fn f() {}").len(), 1);
        assert_eq!(check_file(PURE_FILES[0], "//! x\nuse std::io::Read;\n").len(), 1);
        assert_eq!(check_file(PURE_FILES[0], "//! x\n/// Of a ProcessGroup.\n").len(), 0);
    }
}
