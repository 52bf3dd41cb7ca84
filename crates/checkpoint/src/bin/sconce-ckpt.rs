//! sconce-ckpt: looks at, checks, compares and converts checkpoints. All of it is in `sconce_checkpoint::cli`.

fn main() -> std::process::ExitCode {
    sconce_checkpoint::cli::main()
}
