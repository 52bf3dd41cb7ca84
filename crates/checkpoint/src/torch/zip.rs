//! Zip records of `torch.save`, addressed where they lie: stored, not compressed, none inside another.

use std::collections::HashMap;

use rawzip::{CompressionMethod, ZipLocator};

use crate::region::Region;
use crate::{Error, Result};

/// The records of one archive.
#[derive(Debug)]
pub(crate) struct Archive {
    region: Region,
    /// What the names begin with, the slash included.
    prefix: String,
    records: Vec<Record>,
    /// Places of records by their names.
    by_name: HashMap<String, usize>,
}

#[derive(Debug)]
struct Record {
    name: String,
    start: u64,
    len: u64,
    crc32: u32,
}

/// The longest name of a record, and with it the most that a local header may hold before its data.
const MAX_HEADER: usize = 1 << 16;

impl Archive {
    /// The archive that fills `region`.
    ///
    /// # Errors
    /// `Refused` for compressed, encrypted, linked or overlapping records, names that leave the archive, and the
    /// format of torch before 1.6; `Corrupt` for anything else that is no archive of torch's.
    pub(crate) fn open(region: Region) -> Result<Self> {
        refuse_legacy(&region)?;
        let mut buffer = vec![0; rawzip::RECOMMENDED_BUFFER_SIZE.max(MAX_HEADER)];
        let located = ZipLocator::new().locate_in_reader(region.clone(), &mut buffer, region.len());
        let archive = located.map_err(|(_, e)| damaged(&region, 0, &e.to_string()))?;
        let directory = archive.directory_offset();
        let mut records = Vec::new();
        let mut ways = Vec::new();
        let mut entries = archive.entries(&mut buffer);
        while let Some(entry) =
            entries.next_entry().map_err(|e| damaged(&region, directory, &e.to_string()))?
        {
            let name = std::str::from_utf8(entry.file_path().as_ref()).map(str::to_owned);
            let name = name.map_err(|_| damaged(&region, directory, "a record's name that is not UTF-8"))?;
            check_entry(&region, &name, &entry)?;
            ways.push((entry.wayfinder(), entry.compressed_size_hint() == entry.uncompressed_size_hint()));
            records.push(Record {
                name,
                start: entry.local_header_offset(),
                len: entry.uncompressed_size_hint(),
                crc32: entry.crc32(),
            });
        }
        let mut taken = Vec::with_capacity(records.len());
        for (record, (way, is_stored)) in records.iter_mut().zip(ways) {
            let of_record =
                |what: &str| damaged(&region, record.start, &format!("record {}: {what}", record.name));
            let entry = archive.get_entry(way).map_err(|e| of_record(&e.to_string()))?;
            let local = entry.local_header(&mut buffer).map_err(|e| of_record(&e.to_string()))?;
            if local.file_path().as_ref() != record.name.as_bytes() || !is_stored {
                return Err(of_record("its two headers differ"));
            }
            let (start, end) = entry.compressed_data_range();
            if end > directory || end.checked_sub(start) != Some(record.len) {
                return Err(of_record("it does not end before the directory"));
            }
            taken.push((record.start, end));
            record.start = start;
        }
        refuse_overlap(&region, taken)?;
        let prefix =
            prefix(&records).ok_or_else(|| damaged(&region, 0, "a zip archive without a record data.pkl"))?;
        let named = records.iter().enumerate();
        let by_name: HashMap<_, _> = named.map(|(nth, record)| (record.name.clone(), nth)).collect();
        if by_name.len() < records.len() {
            return Err(Error::refused(region.path(), region.start(), "zip records of one name"));
        }
        Ok(Self { region, prefix, records, by_name })
    }

    /// The bytes of a record, by its name without the archive's own.
    pub(crate) fn record(&self, name: &str) -> Option<Region> {
        let record = &self.records[*self.by_name.get(&format!("{}{name}", self.prefix))?];
        self.region.part(record.start, record.len)
    }

    /// Whether torch computed checksums: `torch.serialization.set_crc32_options(False)` leaves zeros.
    pub(crate) fn has_checksums(&self) -> bool {
        self.records.iter().any(|record| record.crc32 != 0)
    }

    /// Every record's bytes, its name and the checksum that torch stored.
    pub(crate) fn checked_records(&self) -> impl Iterator<Item = (&str, Option<Region>, u32)> {
        self.records.iter().map(|r| (r.name.as_str(), self.region.part(r.start, r.len), r.crc32))
    }

    pub(crate) fn region(&self) -> &Region {
        &self.region
    }
}

fn check_entry(region: &Region, name: &str, entry: &rawzip::ZipFileHeaderRecord<'_>) -> Result<()> {
    let refuse = |what: &str| {
        Err(Error::refused(region.path(), region.start(), format!("zip record {name:.80}: {what}")))
    };
    let leaves =
        name.starts_with('/') || name.contains(['\\', '\0']) || name.split('/').any(|part| part == "..");
    if leaves {
        return refuse("a name that leaves the archive");
    }
    if entry.compression_method() != CompressionMethod::STORE {
        return refuse("compressed, which torch never does");
    }
    if entry.flags().is_encrypted() {
        return refuse("encrypted");
    }
    const LINK: u32 = 0o120_000;
    if entry.external_attributes() >> 16 & 0o170_000 == LINK {
        return refuse("a symbolic link");
    }
    Ok(())
}

fn refuse_overlap(region: &Region, mut taken: Vec<(u64, u64)>) -> Result<()> {
    taken.sort_unstable();
    match taken.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        None => Ok(()),
        Some(pair) => {
            Err(Error::refused(region.path(), region.start() + pair[1].0, "zip records that overlap"))
        }
    }
}

/// Before 1.6, torch wrote several pickles one after the other; before 0.1.10, a tar archive.
fn refuse_legacy(region: &Region) -> Result<()> {
    const MAGIC: [u8; 14] = *b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
    let mut first = [0; 14];
    let len = region.len().min(14) as usize;
    region.read(0, &mut first[..len])?;
    if first == MAGIC {
        let what = "the format of torch.save before 1.6; torch.save(torch.load(file), file) in a later torch changes it";
        return Err(Error::refused(region.path(), region.start(), what));
    }
    if first.starts_with(b"PK") {
        Ok(())
    } else {
        Err(damaged(region, 0, "bytes that no zip archive begins with"))
    }
}

/// The name of the archive itself, which torch puts before every record.
fn prefix(records: &[Record]) -> Option<String> {
    let is_pickle =
        |record: &&Record| record.name.ends_with("/data.pkl") && record.name.matches('/').count() == 1;
    let pickle = records.iter().find(is_pickle)?;
    Some(pickle.name[..pickle.name.len() - "data.pkl".len()].to_owned())
}

fn damaged(region: &Region, at: u64, got: &str) -> Error {
    Error::Corrupt {
        path: region.owned_path(),
        what: "an archive of torch.save".to_owned(),
        offset_bytes: region.start() + at,
        fqns: Vec::new(),
        expected: "zip records".to_owned(),
        got: got.to_owned(),
    }
}
