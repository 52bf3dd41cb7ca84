//! The classes and functions that a pickle may name. Nothing here runs: a name stands for the data it was given.

use crate::torch::dtypes::TorchDType;

/// Something that torch's pickles name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::torch) enum Class {
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorProperties,
    MemFormatEncoding,
    StorageMeta,
    StorageInfo,
    Size,
    Device,
    Layout,
    Path,
    DType(TorchDType),
    /// A storage class of torch; `None` for storages of bytes.
    Storage(Option<TorchDType>),
    Tensor,
    Parameter,
    RebuildTensorV2,
    RebuildTensorV3,
    RebuildTensorPlain,
    RebuildParameter,
    RebuildFromType,
    OrderedDict,
    DefaultDict,
    Counter,
    Encode,
    BytesIo,
    Bytes,
    ByteArray,
    Set,
    FrozenSet,
    List,
    Dict,
    Tuple,
    Int,
    Float,
    Str,
    Bool,
    Complex,
    /// How some versions of Python write the member of an enumeration.
    GetAttr,
    /// Any that is not on the list.
    Opaque,
}

/// Where torch has kept the classes of its checkpoints: now, before 2.0, and before 2.3 for tensor properties.
const CHECKPOINT_MODULES: [&str; 5] = [
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed._shard.checkpoint.metadata",
    "torch.distributed._shard.checkpoint.filesystem",
    "torch.distributed._shard.sharded_tensor.metadata",
];

const CHECKPOINT_CLASSES: [(&str, Class); 10] = [
    ("Metadata", Class::Metadata),
    ("MetadataIndex", Class::MetadataIndex),
    ("TensorStorageMetadata", Class::TensorStorageMetadata),
    ("BytesStorageMetadata", Class::BytesStorageMetadata),
    ("ChunkStorageMetadata", Class::ChunkStorageMetadata),
    ("TensorProperties", Class::TensorProperties),
    ("_MEM_FORMAT_ENCODING", Class::MemFormatEncoding),
    ("MEM_FORMAT_ENCODING", Class::MemFormatEncoding),
    ("StorageMeta", Class::StorageMeta),
    ("_StorageInfo", Class::StorageInfo),
];

const OTHERS: [(&str, &str, Class); 17] = [
    ("torch", "Size", Class::Size),
    ("torch", "device", Class::Device),
    ("torch", "Tensor", Class::Tensor),
    ("torch.nn.parameter", "Parameter", Class::Parameter),
    ("torch._tensor", "_rebuild_from_type_v2", Class::RebuildFromType),
    ("torch._utils", "_rebuild_tensor", Class::RebuildTensorPlain),
    ("torch._utils", "_rebuild_tensor_v2", Class::RebuildTensorV2),
    ("torch._utils", "_rebuild_tensor_v3", Class::RebuildTensorV3),
    ("torch._utils", "_rebuild_parameter", Class::RebuildParameter),
    ("torch._utils", "_rebuild_parameter_with_state", Class::RebuildParameter),
    ("torch.serialization", "_get_layout", Class::Layout),
    ("torch.storage", "UntypedStorage", Class::Storage(None)),
    ("collections", "OrderedDict", Class::OrderedDict),
    ("collections", "defaultdict", Class::DefaultDict),
    ("collections", "Counter", Class::Counter),
    ("_codecs", "encode", Class::Encode),
    // The extra state of modules.
    ("_io", "BytesIO", Class::BytesIo),
];

const BUILTINS: [(&str, Class); 13] = [
    ("bytes", Class::Bytes),
    ("bytearray", Class::ByteArray),
    ("set", Class::Set),
    ("frozenset", Class::FrozenSet),
    ("list", Class::List),
    ("dict", Class::Dict),
    ("tuple", Class::Tuple),
    ("int", Class::Int),
    ("float", Class::Float),
    ("str", Class::Str),
    ("bool", Class::Bool),
    ("complex", Class::Complex),
    ("getattr", Class::GetAttr),
];

impl Class {
    /// The class of that name, if it is on the list.
    pub(super) fn find(module: &str, name: &str) -> Option<Class> {
        let listed = |list: &[(&str, Class)]| list.iter().find(|entry| entry.0 == name).map(|entry| entry.1);
        match module {
            "builtins" | "__builtin__" => listed(&BUILTINS),
            "pathlib" | "pathlib._local" => {
                let is_path = matches!(
                    name,
                    "Path" | "PosixPath" | "PurePosixPath" | "WindowsPath" | "PureWindowsPath"
                );
                is_path.then_some(Class::Path)
            }
            module if CHECKPOINT_MODULES.contains(&module) => listed(&CHECKPOINT_CLASSES),
            module => {
                let other = OTHERS.iter().find(|entry| entry.0 == module && entry.1 == name);
                other.map(|entry| entry.2).or_else(|| torch_type(module, name))
            }
        }
    }

    /// Whether it makes a tensor.
    pub(in crate::torch) fn makes_tensor(self) -> bool {
        matches!(
            self,
            Class::RebuildTensorV2
                | Class::RebuildTensorV3
                | Class::RebuildTensorPlain
                | Class::RebuildParameter
                | Class::RebuildFromType
        )
    }

    /// Its name in Python, without the module.
    pub(super) fn name(self) -> &'static str {
        match self {
            Class::DType(dtype) => dtype.name(),
            Class::Storage(_) => "a torch storage",
            Class::Path => "Path",
            Class::Layout => "_get_layout",
            Class::Opaque => "a class that is not on the list",
            class => {
                let known = CHECKPOINT_CLASSES.iter().chain(&BUILTINS).find(|entry| entry.1 == class);
                let other = || OTHERS.iter().find(|entry| entry.2 == class).map(|entry| entry.1);
                known.map(|entry| entry.0).or_else(other).unwrap_or("a class")
            }
        }
    }
}

/// `torch.float32`, `torch.FloatStorage` and their like.
fn torch_type(module: &str, name: &str) -> Option<Class> {
    if module != "torch" {
        return None;
    }
    if name == "UntypedStorage" {
        return Some(Class::Storage(None));
    }
    let dtype = TorchDType::by_name(name).map(Class::DType);
    dtype.or_else(|| TorchDType::by_storage(name).map(|dtype| Class::Storage(Some(dtype))))
}
