//! The program `sconce-ckpt`: what a checkpoint holds, whether it is whole, and how it becomes another.
//!
//! Exit codes: 0 as asked, 1 damage or a difference was found, 2 wrong arguments, 3 nothing that can be read or written.

mod args;
mod cat;
mod convert;
mod diff;
mod elements;
mod inspect;
mod output;
mod pieces;
mod plot;
mod prune;
mod verify;
mod watch;

use std::io::Write as _;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use self::args::{Args, Command};
use self::output::Output;
use crate::Result;

/// What a command found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Nothing,
    /// Damage, or a difference.
    Something,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let mut out = Output::new(args.json);
    let found = run(&args.command, &mut out);
    if let Err(error) = &found {
        out.error(error);
    }
    if let Some(failure) = out.failure() {
        let _ = writeln!(std::io::stderr().lock(), "sconce-ckpt: standard output: {failure}");
        return ExitCode::from(3);
    }
    match found {
        Ok(Found::Nothing) => ExitCode::SUCCESS,
        Ok(Found::Something) => ExitCode::from(1),
        Err(_) => ExitCode::from(3),
    }
}

fn run(command: &Command, out: &mut Output) -> Result<Found> {
    match command {
        Command::Inspect(args) => inspect::run(args, out),
        Command::Verify(args) => verify::run(args, out),
        Command::Diff(args) => diff::run(args, out),
        Command::Convert(args) => convert::convert(args, out),
        Command::Reshard(args) => convert::reshard(args, out),
        Command::Cat(args) => cat::run(args, out),
        Command::Plot(args) => plot::run(args, out),
        Command::Prune(args) => prune::run(args, out),
        Command::Watch(args) => watch::run(args, out),
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Args::command(), "sconce-ckpt", &mut text);
            out.text(&String::from_utf8_lossy(&text));
            Ok(Found::Nothing)
        }
        Command::Man => {
            let text = man_page();
            out.text(&text.map_err(|e| crate::Error::io("render", std::path::Path::new("man page"), &e))?);
            Ok(Found::Nothing)
        }
    }
}

/// One page with every command and its options, in the order in which they are listed.
fn man_page() -> std::io::Result<String> {
    let mut command = Args::command();
    command.build();
    let mut text = Vec::new();
    let page = clap_mangen::Man::new(command.clone());
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        let mut part = Vec::new();
        let page = clap_mangen::Man::new(sub.clone());
        page.render_synopsis_section(&mut part)?;
        page.render_description_section(&mut part)?;
        page.render_options_section(&mut part)?;
        let part = String::from_utf8_lossy(&part).into_owned();
        // Sections of the command become parts of one section.
        writeln!(text, ".SH \"{}\"", sub.get_name().to_uppercase())?;
        text.extend_from_slice(part.replace("\n.SH ", "\n.SS ").as_bytes());
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}
