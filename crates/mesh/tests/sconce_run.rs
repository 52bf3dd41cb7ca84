//! sconce-run as its users meet it: environment, output, exit codes, signals, restarts, and what is left behind.

#![allow(clippy::unwrap_used, reason = "test code: clippy knows it only inside `#[test]` functions")]

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

const LONG: Duration = Duration::from_secs(20);

fn sconce_run(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sconce-run"));
    command.args(arguments).stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    sconce_run(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The example, which Cargo builds with the tests unless only some of them are asked for.
fn example() -> String {
    let bin = PathBuf::from(env!("CARGO_BIN_EXE_sconce-run"));
    let example = bin.with_file_name("examples").join("ranks");
    assert!(example.exists(), "cargo build -p sconce-mesh --features tcp-store --example ranks");
    example.to_string_lossy().into_owned()
}

fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort();
    lines
}

#[test]
fn ranks_get_torchruns_variables_and_print_behind_their_number() {
    let script = "echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE; echo err >&2";
    let output = run(&["--nproc-per-node", "2", "sh", "-c", script]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(sorted(&text(&output.stdout)), ["[0] 0 0 2 2", "[1] 1 1 2 2"]);
    assert_eq!(sorted(&text(&output.stderr)), ["[0] err", "[1] err"]);
}

#[test]
fn one_program_runs_under_sconce_run_and_with_variables_set_by_hand() {
    let output = run(&["--nproc-per-node", "3", &example()]);
    assert!(output.status.success(), "{output:?}");
    let expected = ["[0] rank 0 of 3: sum 3", "[1] rank 1 of 3: sum 3", "[2] rank 2 of 3: sum 3"];
    assert_eq!(sorted(&text(&output.stdout)), expected);

    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let start = |rank: u32| {
        let mut command = Command::new(example());
        command.env("RANK", rank.to_string()).env("WORLD_SIZE", "2");
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        command.stdout(Stdio::piped()).spawn().unwrap()
    };
    for (rank, child) in [0, 1].map(start).into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        assert_eq!(text(&output.stdout), format!("rank {rank} of 2: sum 1\n"));
    }
}

#[test]
fn two_nodes_make_one_world() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let node = |rank: &str| {
        let arguments = [
            "--nnodes",
            "2",
            "--node-rank",
            rank,
            "--nproc-per-node",
            "2",
            "--master-port",
            &port,
            &example(),
        ];
        let mut command = sconce_run(&arguments);
        command.env("SCONCE_STORE_TOKEN", "secret").stdout(Stdio::piped()).spawn().unwrap()
    };
    let outputs = [node("1"), node("0")].map(|node| node.wait_with_output().unwrap());
    let printed: Vec<String> = outputs.iter().map(|output| text(&output.stdout)).collect();
    assert_eq!(sorted(&printed[1]), ["[0] rank 0 of 4: sum 6", "[1] rank 1 of 4: sum 6"]);
    assert_eq!(sorted(&printed[0]), ["[2] rank 2 of 4: sum 6", "[3] rank 3 of 4: sum 6"]);
}

#[test]
fn the_first_failing_ranks_code_and_last_lines_are_the_launchers() {
    let script = "echo line of $RANK; [ $RANK = 1 ] && exit 7; sleep 100";
    let started = Instant::now();
    let output = run(&["--nproc-per-node", "3", "sh", "-c", script]);
    assert_eq!(output.status.code(), Some(7));
    let errors = text(&output.stderr);
    let expected = "sconce-run: rank 1 failed with exit code 7\nsconce-run: its last lines:\nline of 1";
    assert!(errors.contains(expected), "{errors}");
    assert!(started.elapsed() < LONG);
}

#[test]
fn bad_arguments_and_missing_programs_are_named() {
    for (arguments, expected) in [
        (&["--nproc-per-node", "0", "true"][..], "expected `auto` or a number from 1"),
        (
            &["--nnodes", "2", "--node-rank", "2", "true"],
            "--node-rank: expected a node below --nnodes 2, got 2",
        ),
        (&["--elastic", "4:2", "true"], "expected MIN:MAX such as 2:4"),
        (&["--elastic", "2:4", "--nnodes", "2", "true"], "cannot be used with"),
        (&["--nnodes", "2", "true"], "SCONCE_STORE_TOKEN: expected a secret"),
        (&["--nproc-per-node", "1", "/no/such/program"], "/no/such/program: No such file"),
    ] {
        let output = sconce_run(arguments).env_remove("SCONCE_STORE_TOKEN").output().unwrap();
        assert!(!output.status.success());
        let errors = text(&output.stderr);
        assert!(errors.contains(expected), "{arguments:?}: {errors}");
    }
}

#[test]
fn log_files_hold_what_each_rank_printed() {
    let dir = tempfile::tempdir().unwrap();
    let logs = dir.path().join("logs");
    let logs_text = logs.to_string_lossy();
    let output = run(&["--log-dir", &logs_text, "--nproc-per-node", "2", "sh", "-c", "echo I am $RANK"]);
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    for rank in 0..2 {
        let log = std::fs::read_to_string(logs.join(format!("rank-{rank}.log"))).unwrap();
        assert_eq!(log, format!("I am {rank}\n"));
    }
}

#[test]
fn ranks_are_started_again_as_often_as_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let count =
        |file: &str| std::fs::read_to_string(dir.path().join(file)).unwrap_or_default().lines().count();
    let script = |successes: usize| {
        let file = dir.path().join(successes.to_string());
        format!("echo >> {0}; [ $(wc -l < {0}) -gt {successes} ]", file.display())
    };
    let attempt = |script: &str| run(&["--max-restarts", "2", "--nproc-per-node", "1", "sh", "-c", script]);
    assert!(attempt(&script(2)).status.success());
    assert_eq!(count("2"), 3);
    assert_eq!(attempt(&script(9)).status.code(), Some(1));
    assert_eq!(count("9"), 3);
}

/// What ranks of each world said, `RESTART/WORLD_SIZE` for each world in order.
fn worlds(stdout: &[u8]) -> Vec<String> {
    let mut worlds: Vec<String> = vec![];
    for line in text(stdout).lines() {
        let world = line.split_once("] ").unwrap().1.to_owned();
        if worlds.last() != Some(&world) {
            worlds.push(world);
        }
    }
    worlds
}

#[test]
fn an_elastic_world_goes_on_without_a_lost_rank_and_grows_again_when_its_slot_is_back() {
    // Restart 0: rank 2 of 4 is killed. Then 3 ranks work until they are asked to end, and 4 finish.
    let script = "echo $TORCHELASTIC_RESTART_COUNT/$WORLD_SIZE; trap 'exit 0' TERM
        if [ $TORCHELASTIC_RESTART_COUNT = 0 ]; then
            [ $RANK = 2 ] && { sleep 0.2; kill -9 $$; }; sleep 100 & wait
        elif [ $WORLD_SIZE = 3 ]; then
            sleep 100 & wait
        fi";
    let started = Instant::now();
    let arguments = ["--elastic", "2:4", "--slot-cooldown", "1.5", "--max-restarts", "1", "sh", "-c", script];
    let output = run(&arguments);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(worlds(&output.stdout), ["0/4", "1/3", "1/4"]);
    let errors = text(&output.stderr);
    assert!(errors.contains("rank 2 died of signal 9"), "{errors}");
    assert!(errors.contains("a slot is back: starting again with 4 ranks"), "{errors}");
    assert!(started.elapsed() < LONG);
}

#[test]
fn an_elastic_world_below_its_least_waits_for_a_slot() {
    let script = "echo $TORCHELASTIC_RESTART_COUNT/$WORLD_SIZE; [ $TORCHELASTIC_RESTART_COUNT = 1 ] && exit 0
        [ $RANK = 0 ] && kill -9 $$; exit 0";
    let started = Instant::now();
    let output =
        run(&["--elastic", "2:2", "--slot-cooldown", "0.7", "--max-restarts", "3", "sh", "-c", script]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(worlds(&output.stdout), ["0/2", "1/2"]);
    assert!(started.elapsed() > Duration::from_millis(700), "{:?}", started.elapsed());
}

#[test]
fn the_rank_that_died_is_blamed_not_those_that_lost_it() {
    // Rank 0 fails because rank 1 is gone.
    let script = "[ $RANK = 1 ] && kill -9 $$; sleep 0.3; exit 5";
    let output = run(&["--nproc-per-node", "2", "sh", "-c", script]);
    assert_eq!(output.status.code(), Some(128 + 9));
    assert!(text(&output.stderr).contains("rank 1 died of signal 9"));
}

/// Starts ranks that print their pid and sleep; returns the launcher's and theirs.
fn sleepers(arguments: &[&str], script: &str) -> (std::process::Child, Vec<Pid>) {
    let all = [arguments, &["--nproc-per-node", "2", "sh", "-c", script]].concat();
    let mut launcher = sconce_run(&all).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(launcher.stdout.take().unwrap()).lines().take(2);
    let pids = lines.map(|line| {
        let line = line.unwrap();
        Pid::from_raw(line.split_once("] ").unwrap().1.parse().unwrap()).unwrap()
    });
    let pids = pids.collect();
    (launcher, pids)
}

fn await_end(pid: Pid) {
    let started = Instant::now();
    // A zombie whose new parent has not come yet has ended as well.
    let lives = |pid: Pid| {
        let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
        test_kill_process(pid).is_ok() && !stat.unwrap_or_default().contains(") Z")
    };
    while lives(pid) {
        assert!(started.elapsed() < LONG, "process {pid} outlives the launcher");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn ranks_end_with_a_launcher_that_is_killed() {
    let (mut launcher, pids) = sleepers(&[], "echo $$; exec sleep 100");
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    pids.into_iter().for_each(await_end);
}

#[test]
fn signals_reach_the_ranks_and_what_they_leave_behind_is_ended() {
    let script = "trap 'echo got it; exit 3' TERM; echo $$; while :; do sleep 0.01; done";
    let (launcher, pids) = sleepers(&["--max-restarts", "5"], script);
    kill_process(Pid::from_child(&launcher), Signal::TERM).unwrap();
    let output = launcher.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(!text(&output.stderr).contains("starting all ranks again"));
    pids.into_iter().for_each(await_end);
}

#[test]
fn the_monitor_tells_who_runs() {
    let output = run(&["--monitor", "0.05", "--nproc-per-node", "1", "sleep", "0.5"]);
    let errors = text(&output.stderr);
    assert!(errors.contains("rank 0 S ") && errors.contains(" MiB"), "{errors}");
}

#[test]
fn what_a_rank_left_in_a_session_of_its_own_holds_nothing_up() {
    let started = Instant::now();
    // The daemon keeps the rank's output open.
    let output = run(&["--nproc_per_node", "1", "sh", "-c", "setsid sleep 30 & echo done"]);
    assert!(output.status.success() && started.elapsed() < LONG, "{:?}: {output:?}", started.elapsed());
    assert_eq!(text(&output.stdout), "[0] done\n");
}

#[test]
fn a_program_behind_a_shell_runs_too() {
    let script = format!("{} && echo after", example());
    let output = run(&["--nproc-per-node", "2", "sh", "-c", &script]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text(&output.stdout).matches("after").count(), 2);
}

#[test]
fn logs_of_a_rank_that_is_started_again_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let logs = dir.path().to_string_lossy().into_owned();
    let script = "echo attempt $TORCHELASTIC_RESTART_COUNT; test $TORCHELASTIC_RESTART_COUNT = 1";
    let arguments = ["--nproc-per-node", "1", "--max-restarts", "1", "--log-dir", &logs, "sh", "-c", script];
    assert!(run(&arguments).status.success());
    let log = std::fs::read_to_string(dir.path().join("rank-0.log")).unwrap();
    assert_eq!(log, "attempt 0\nattempt 1\n");
}
