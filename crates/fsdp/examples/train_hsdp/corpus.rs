//! Text to batches: every *.rs and *.md file below a directory, one token a character.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};

use crate::AnyResult;

/// Characters of one sequence.
pub(crate) const CONTEXT: usize = 64;
/// Sequences of one rank's batch.
pub(crate) const BATCH: usize = 4;

/// The text as tokens, and the number of different ones.
pub(crate) struct Corpus {
    tokens: Vec<u32>,
    pub(crate) vocabulary: usize,
}

impl Corpus {
    /// Reads the files in the order of their paths, so that every rank sees the same text.
    pub(crate) fn read(dir: &Path) -> AnyResult<Self> {
        let mut files = Vec::new();
        collect(dir, &mut files)?;
        files.sort();
        let mut text = String::new();
        for file in &files {
            text.push_str(&String::from_utf8_lossy(&std::fs::read(file)?));
        }
        let mut counts = BTreeMap::<char, usize>::new();
        text.chars().for_each(|c| *counts.entry(c).or_default() += 1);
        // Characters seen fewer than 20 times share token 0.
        let frequent = counts.iter().filter(|(_, n)| **n >= 20).map(|(c, _)| *c);
        let ids: BTreeMap<char, u32> = frequent.zip(1..).collect();
        let tokens: Vec<u32> = text.chars().map(|c| ids.get(&c).copied().unwrap_or(0)).collect();
        if tokens.len() < 100 * CONTEXT {
            let found = format!("{} characters in {} files", tokens.len(), files.len());
            return Err(format!("{}: too little *.rs and *.md text: {found}", dir.display()).into());
        }
        Ok(Self { tokens, vocabulary: ids.len() + 1 })
    }

    /// Inputs and targets `[BATCH, CONTEXT]`, u32; the same numbers give the same batch.
    pub(crate) fn batch(&self, step: usize, rank: usize) -> candle_core::Result<(Tensor, Tensor)> {
        let mut inputs = Vec::with_capacity(BATCH * CONTEXT);
        let mut targets = Vec::with_capacity(BATCH * CONTEXT);
        for row in 0..BATCH {
            let at =
                scramble((step * 1009 + rank * 31 + row) as u64) % (self.tokens.len() - CONTEXT - 1) as u64;
            let window = &self.tokens[at as usize..][..CONTEXT + 1];
            inputs.extend_from_slice(&window[..CONTEXT]);
            targets.extend_from_slice(&window[1..]);
        }
        let shape = (BATCH, CONTEXT);
        Ok((Tensor::from_vec(inputs, shape, &Device::Cpu)?, Tensor::from_vec(targets, shape, &Device::Cpu)?))
    }
}

/// Files below `dir`; hidden directories, `target` and checkpoints are left out, links are not followed.
fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> AnyResult<()> {
    for entry in std::fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))? {
        let entry = entry?;
        let (path, kind, name) = (entry.path(), entry.file_type()?, entry.file_name());
        let name = name.to_string_lossy();
        if kind.is_dir() && !name.starts_with('.') && name != "target" && name != "runs" {
            collect(&path, files)?;
        } else if kind.is_file() && (name.ends_with(".rs") || name.ends_with(".md")) {
            files.push(path);
        }
    }
    Ok(())
}

/// SplitMix64's finalizer.
fn scramble(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}
