//! Place: where a case runs. The same bodies serve the CPU and CUDA devices; only this differs.

use candle_core::{Device, Result, Tensor};
use sconce_mesh::{BackendSpec, CudaBackend, DeviceType, ProcessGroup};

/// How many rank processes the cases on CUDA devices have: `cargo xtask gpu-test` says it.
const GPU_RANKS: &str = "SCONCE_GPU_RANKS";

/// The device of a case, and what carries its tensors between ranks.
#[derive(Debug, Clone)]
pub struct Place {
    /// That of the case's meshes.
    pub device_type: DeviceType,
    /// Where this rank's tensors lie.
    pub device: Device,
    /// What carries them if that is a CUDA device.
    pub cuda: Option<CudaBackend>,
}

impl Place {
    /// Host memory.
    pub const CPU: Place = Place { device_type: DeviceType::Cpu, device: Device::Cpu, cuda: None };

    /// A CUDA device for each rank of `world`, as many as there are, in turns.
    ///
    /// # Panics
    /// If this build has no CUDA, or the machine no device.
    pub fn cuda(world: &ProcessGroup) -> Place {
        let ordinal = world.rank().0 % n_devices();
        let device = Device::new_cuda_with_stream(ordinal).expect("a CUDA device");
        let named = BackendSpec::from_env().expect("SCONCE_BACKEND names backends").cuda;
        let default = if cfg!(feature = "nccl") { CudaBackend::Nccl } else { CudaBackend::Local };
        Place { device_type: DeviceType::Cuda, device, cuda: Some(named.unwrap_or(default)) }
    }

    /// `tensor` at this place.
    ///
    /// # Errors
    /// There is no memory.
    pub fn put(&self, tensor: &Tensor) -> Result<Tensor> {
        tensor.to_device(&self.device)
    }
}

/// How many rank processes the cases on CUDA devices have.
///
/// # Panics
/// If the environment says no number.
pub fn gpu_ranks() -> usize {
    std::env::var(GPU_RANKS).map_or(1, |n| n.parse().expect("SCONCE_GPU_RANKS is a number of ranks"))
}

#[cfg(feature = "cuda")]
fn n_devices() -> usize {
    let n = sconce_mesh::cuda::device_count().expect("the driver counts devices");
    assert!(n > 0, "there is no CUDA device");
    n
}

#[cfg(not(feature = "cuda"))]
fn n_devices() -> usize {
    panic!("this build has no CUDA: cargo xtask gpu-test")
}
