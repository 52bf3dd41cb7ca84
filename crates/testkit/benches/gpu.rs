//! What CUDA devices make of it: the bandwidth of NCCL through process groups, what overlap saves of an FSDP step, and saves
//! of device memory beside the copy and the write alone. Prints tables and judges nothing: `cargo xtask bench gpu`.
//!
//! Ranks are processes, one a device, or as many as `SCONCE_GPU_RANKS` says. Times are medians of the slowest rank.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark stops at the first failure")]

use std::process::Command;
use std::time::{Duration, Instant};

use candle_core::{CudaDevice, CudaStorage, DType as CandleDType, Device, Layout, Tensor};
use candle_nn::{Module, linear};
use sconce_checkpoint::{SaveOptions, save_with};
use sconce_dtensor::{StateDict, Value};
use sconce_fsdp::{Fsdp, FsdpBuilder, FsdpConfig, Optimizer, Overlap, Sgd, SgdConfig, Sharded, WrapPolicy};
use sconce_mesh::cuda::{CudaBytes, CudaBytesMut, device_count, read_chunks, uninit};
use sconce_mesh::{
    DType, DeviceMesh, DeviceType, GroupOptions, ProcessGroup, RankEnv, RankOutput, RankProcesses, ReduceOp,
    die_with_parent,
};

const BYTES: [usize; 5] = [1 << 16, 1 << 20, 16 << 20, 64 << 20, 256 << 20];
const REPEATS: usize = 20;
const WIDTH: usize = 4096;
const LAYERS: usize = 8;
const ROWS: usize = 4096;
const SAVED_BYTES: usize = 1 << 30;

fn main() {
    die_with_parent().unwrap();
    if RankEnv::from_env().unwrap().world_size > 1 || std::env::var_os("SCONCE_BENCH_RANK").is_some() {
        return rank();
    }
    let devices = device_count().unwrap();
    let ranks = std::env::var("SCONCE_GPU_RANKS").map_or(devices, |n| n.parse().unwrap());
    let command = |_: &RankEnv| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env("SCONCE_BENCH_RANK", "1");
        command
    };
    let mut ranks = RankProcesses::spawn(ranks, RankOutput::Inherited, command).unwrap();
    ranks.wait(Some(Duration::from_secs(900)), Duration::from_secs(10)).unwrap();
}

fn rank() {
    let world = ProcessGroup::from_env(GroupOptions::default()).unwrap();
    let ordinal = world.rank().0 % device_count().unwrap();
    let device = Device::new_cuda_with_stream(ordinal).unwrap();
    let Device::Cuda(cuda) = &device else { unreachable!("it was made so") };
    bandwidth(&world, cuda);
    overlap(&world, &device);
    saves(&world, &device);
}

/// Seconds of the slowest rank, the median of repeats. Each call returns once its result is there.
fn median(world: &ProcessGroup, repeats: usize, mut call: impl FnMut()) -> f64 {
    call();
    let mut seconds: Vec<f64> = (0..repeats)
        .map(|_| {
            world.barrier().unwrap();
            let started = Instant::now();
            call();
            let mut slowest = [started.elapsed().as_secs_f64()];
            world.all_reduce(&mut slowest, ReduceOp::Max).unwrap();
            slowest[0]
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[repeats / 2]
}

fn say(world: &ProcessGroup, line: &str) {
    if world.rank().0 == 0 {
        println!("{line}");
    }
}

/// As nccl-tests counts: bytes of the longest buffer over time, and times what every algorithm must move of it.
fn bandwidth(world: &ProcessGroup, device: &CudaDevice) {
    let n = world.size();
    say(world, "op\tranks\tbytes\tus\talgbw GB/s\tbusbw GB/s");
    for bytes in BYTES {
        let (whole, part) = (bytes / 4 / n * n, bytes / 4 / n);
        let mut long = zeros(device, whole);
        let mut short = zeros(device, part);
        let (all, one) = (Layout::contiguous(whole), Layout::contiguous(part));
        let moved = (n as f64 - 1.0) / n as f64;
        let report = |op: &str, seconds: f64, factor: f64| {
            let algbw = (whole * 4) as f64 / seconds / 1e9;
            let line =
                format!("{op}\t{n}\t{}\t{:.1}\t{algbw:.2}\t{:.2}", whole * 4, seconds * 1e6, algbw * factor);
            say(world, &line);
        };
        let seconds = median(world, REPEATS, || {
            world.cuda_all_reduce(&mut CudaBytesMut::of(&mut long, &all).unwrap(), ReduceOp::Sum).unwrap();
        });
        report("all_reduce", seconds, 2.0 * moved);
        let seconds = median(world, REPEATS, || {
            let output = CudaBytesMut::of(&mut long, &all).unwrap();
            world.cuda_all_gather(&CudaBytes::of(&short, &one).unwrap(), &mut [output]).unwrap();
        });
        report("all_gather", seconds, moved);
        let seconds = median(world, REPEATS, || {
            let mut output = CudaBytesMut::of(&mut short, &one).unwrap();
            let input = CudaBytes::of(&long, &all).unwrap();
            world.cuda_reduce_scatter(&[input], &mut output, ReduceOp::Sum).unwrap();
        });
        report("reduce_scatter", seconds, moved);
    }
}

fn zeros(device: &CudaDevice, numel: usize) -> CudaStorage {
    let mut made = uninit(device, DType::F32, numel).unwrap();
    let zeros = CudaStorage::wrap_cuda_slice(device.alloc_zeros::<f32>(numel).unwrap(), device.clone());
    let layout = Layout::contiguous(numel);
    CudaBytesMut::of(&mut made, &layout)
        .unwrap()
        .copy_from(&CudaBytes::of(&zeros, &layout).unwrap())
        .unwrap();
    made
}

/// A step of a chain of wide layers, each a unit, with and without communication beside computation.
fn overlap(world: &ProcessGroup, device: &Device) {
    say(world, "\nstep of 8 x Linear(4096), 4096 rows a rank, f32\tms");
    let mut times = Vec::new();
    for (what, overlap) in [("one after the other", Overlap::NONE), ("overlapped", Overlap::default())] {
        let (layers, fsdp) = chain(world, device, overlap);
        let mut optim = Sgd::new(&fsdp, SgdConfig { lr: 1e-3, ..SgdConfig::default() }).unwrap();
        let x = Tensor::ones((ROWS, WIDTH), CandleDType::F32, device).unwrap();
        let seconds = median(world, 5, || {
            let forward = || layers.iter().try_fold(x.clone(), |x, layer| layer.forward(&x)?.relu());
            let loss = fsdp.forward(&[&x], || forward()?.mean_all()).unwrap();
            fsdp.backward(&loss).unwrap();
            optim.step(&fsdp).unwrap();
            device.synchronize().unwrap();
        });
        times.push(seconds);
        say(world, &format!("{what}\t{:.1}", seconds * 1e3));
    }
    say(world, &format!("saved by overlap\t{:.0} %", 100.0 * (1.0 - times[1] / times[0])));
}

fn chain(world: &ProcessGroup, device: &Device, overlap: Overlap) -> (Vec<Sharded<candle_nn::Linear>>, Fsdp) {
    let mesh = DeviceMesh::new(world, DeviceType::Cuda, &[world.size()], &[]).unwrap();
    let config = FsdpConfig {
        device: device.clone(),
        overlap,
        units: WrapPolicy::MinNumel(WIDTH * WIDTH),
        ..FsdpConfig::default()
    };
    let builder = FsdpBuilder::new(&mesh, config).unwrap();
    let layer = |nth: usize| {
        let name = format!("layer{nth}");
        builder.wrap(&name, linear(WIDTH, WIDTH, builder.var_builder().pp(&name)).unwrap()).unwrap()
    };
    let layers = (0..LAYERS).map(layer).collect();
    (layers, builder.build().unwrap())
}

/// A save of a tensor on each device, beside the same copy to pinned memory and nothing else.
fn saves(world: &ProcessGroup, device: &Device) {
    let tensor = Tensor::zeros(SAVED_BYTES / 4, CandleDType::F32, device).unwrap();
    let copy = median(world, 5, || {
        let (storage, layout) = tensor.storage_and_layout();
        let candle_core::Storage::Cuda(storage) = &*storage else { unreachable!("it lies on a CUDA device") };
        read_chunks(&CudaBytes::of(storage, layout).unwrap(), |_, chunk| {
            std::hint::black_box(chunk);
        })
        .unwrap();
    });
    // In memory, so that no disk is measured; every rank's name is its own.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let all = world.all_gather_object(dir.path().as_os_str().as_encoded_bytes()).unwrap();
    let first = std::path::PathBuf::from(String::from_utf8(all[0].clone()).unwrap());
    let name = format!("tensor{}", world.rank());
    let plain = {
        let (path, bytes) = (first.join(format!("plain{}", world.rank())), vec![1u8; SAVED_BYTES]);
        let seconds = median(world, 3, || std::fs::write(&path, &bytes).unwrap());
        std::fs::remove_file(&path).unwrap();
        seconds
    };
    let state = StateDict::from_iter([(name, Value::try_from(&tensor).unwrap())]);
    let save = median(world, 3, || {
        let options =
            SaveOptions { group: Some(world), overwrite: true, sync: false, ..SaveOptions::default() };
        save_with(first.join("checkpoint"), &state, options).unwrap();
    });
    let gigabytes = |seconds: f64| SAVED_BYTES as f64 / seconds / 1e9;
    say(world, "\n1 GiB of each device to host memory\tGB/s a rank");
    say(world, &format!("copy to pinned memory\t{:.2}", gigabytes(copy)));
    say(world, &format!("plain write to /dev/shm\t{:.2}", gigabytes(plain)));
    say(world, &format!("save to /dev/shm, with checksums\t{:.2}", gigabytes(save)));
    // The first rank's folder outlives the last save of the others.
    world.barrier().unwrap();
}
