//! The checksums inside of torch's files, which torch itself does not compare when it loads.

use std::path::Path;

use super::dcp::{self, Place};
use super::pickle::Unlisted;
use super::saved;
use super::zip::Archive;
use crate::damage::{Damage, crc_of};
use crate::region::Region;
use crate::storage::PageBuffer;
use crate::{Error, Format, Result};

/// What one thread checks at a time.
pub(crate) struct Item {
    file: String,
    region: Region,
    what: What,
    fqns: Vec<String>,
}

enum What {
    /// The archive of an item of a distributed checkpoint, at most so long.
    Archive(Place, u64),
    /// A record of an archive, with its checksum.
    Record(String, u32),
}

type Items = Vec<std::result::Result<Item, Damage>>;

/// All of what is at `path`, and the number of files; what cannot be opened is damage.
pub(crate) fn items(path: &Path, format: Format) -> Result<(usize, Items)> {
    match format {
        Format::TorchSave => saved_items(path).map(|items| (1, items)),
        _ => distributed_items(path),
    }
}

/// The records of one archive, each with the tensors whose storages lie in it.
fn saved_items(path: &Path) -> Result<Items> {
    let region = Region::open(path, true)?;
    let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let archive = match Archive::open(region.clone()) {
        Ok(archive) => archive,
        // No archive of torch's.
        Err(error @ Error::Refused { .. }) => return Err(error),
        Err(error) => {
            let damage = Damage { file, offset_bytes: 0, what: error.to_string(), fqns: Vec::new() };
            return Ok(vec![Err(damage)]);
        }
    };
    if !archive.has_checksums() {
        return Ok(Vec::new());
    }
    // Names help to say what is damaged; where the pickle itself is, nobody knows them.
    let tensors = saved::read(region, "", Unlisted::Opaque).map(|saved| saved.tensors).unwrap_or_default();
    let item = |(record, region, crc): (&str, Option<Region>, u32)| {
        let region = region?;
        let range = region.start()..region.start() + region.len();
        let within = tensors.iter().filter(|(_, tensor)| range.contains(&tensor.storage().start()));
        let fqns = within.map(|(fqn, _)| fqn.clone()).collect();
        Some(Ok(Item { file: file.clone(), region, what: What::Record(record.to_owned(), crc), fqns }))
    };
    Ok(archive.checked_records().filter_map(item).collect())
}

fn distributed_items(path: &Path) -> Result<(usize, Items)> {
    let (mut files, mut found) = (std::collections::HashMap::new(), Vec::new());
    for (fqn, place, most) in dcp::Reader::new(path).places()? {
        let file =
            files.entry(place.file.clone()).or_insert_with(|| Region::open(&path.join(&place.file), false));
        let damage = |what: String| Damage {
            file: place.file.clone(),
            offset_bytes: place.offset_bytes,
            what,
            fqns: vec![fqn.clone()],
        };
        found.push(match file {
            Err(error) => Err(damage(error.to_string())),
            Ok(file) => match dcp::item_region(file, &place) {
                Err(error) => Err(damage(error.to_string())),
                // Safetensors images have no checksums.
                Ok(None) => continue,
                Ok(Some(region)) => {
                    let file = place.file.clone();
                    Ok(Item { file, region, what: What::Archive(place, most), fqns: vec![fqn] })
                }
            },
        });
    }
    Ok((files.len(), found))
}

impl Item {
    /// Compares the checksum of every record; the bytes that were compared.
    pub(crate) fn check(&self, buffer: &mut PageBuffer) -> (u64, Vec<Damage>) {
        let checked = match &self.what {
            What::Archive(place, most) => self.check_archive(place, *most, buffer),
            What::Record(name, crc) => {
                let damages = self.check_record(name, &self.region, *crc, buffer);
                damages.map(|damage| (self.region.len(), damage.into_iter().collect()))
            }
        };
        checked.unwrap_or_else(|error| {
            (self.region.len(), vec![self.damage(self.region.start(), error.to_string())])
        })
    }

    fn check_archive(&self, place: &Place, most: u64, buffer: &mut PageBuffer) -> Result<(u64, Vec<Damage>)> {
        let archive = Archive::open(dcp::decompressed(self.region.clone(), place, most)?)?;
        if !archive.has_checksums() {
            return Ok((0, Vec::new()));
        }
        let mut damages = Vec::new();
        for (record, region, expected) in archive.checked_records() {
            if let Some(region) = region {
                damages.extend(self.check_record(record, &region, expected, buffer)?);
            }
        }
        Ok((self.region.len(), damages))
    }

    fn check_record(
        &self,
        name: &str,
        region: &Region,
        expected: u32,
        buffer: &mut PageBuffer,
    ) -> Result<Option<Damage>> {
        let got = crc_of(region, buffer)?;
        let what = || format!("record {name}: CRC32 {got:08x}, expected {expected:08x}");
        Ok((got != expected).then(|| self.damage(region.start(), what())))
    }

    fn damage(&self, offset_bytes: u64, what: String) -> Damage {
        Damage { file: self.file.clone(), offset_bytes, what, fqns: self.fqns.clone() }
    }
}
