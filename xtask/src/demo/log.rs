//! What a training run logged: its losses, the size of its world at each step, and digests of what it saved and resumed.

use std::collections::BTreeMap;
use std::path::Path;

/// One step that was done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Step {
    pub(crate) step: u64,
    pub(crate) loss: f64,
    pub(crate) world: usize,
}

/// A run, in the order of its lines. Steps after the last commit before a fault are there twice.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Log {
    pub(crate) steps: Vec<Step>,
    pub(crate) saved: BTreeMap<u64, String>,
    pub(crate) resumed: Vec<(u64, String)>,
}

impl Log {
    pub(crate) fn read(path: &Path) -> Result<Log, String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Self::parse(&text))
    }

    /// The whole lines; the last may be being written.
    fn parse(text: &str) -> Log {
        let mut log = Log::default();
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            let words: Vec<&str> = line.split(' ').collect();
            let step = words.get(1).and_then(|step| step.parse().ok());
            match (words.as_slice(), step) {
                (["step", _, loss, world], Some(step)) => {
                    let (loss, world) = (loss.parse().unwrap_or(f64::NAN), world.parse().unwrap_or(0));
                    log.steps.push(Step { step, loss, world });
                }
                (["saved", _, digest], Some(step)) => drop(log.saved.insert(step, (*digest).to_owned())),
                (["resumed", _, digest], Some(step)) => log.resumed.push((step, (*digest).to_owned())),
                _ => {}
            }
        }
        log
    }

    pub(crate) fn last_step(&self) -> u64 {
        self.steps.last().map_or(0, |step| step.step)
    }

    pub(crate) fn first_loss(&self) -> f64 {
        self.steps.first().map_or(f64::NAN, |step| step.loss)
    }

    pub(crate) fn final_loss(&self) -> f64 {
        self.steps.last().map_or(f64::NAN, |step| step.loss)
    }

    /// Sizes of the worlds, one after the other.
    pub(crate) fn worlds(&self) -> Vec<usize> {
        let mut worlds: Vec<usize> = self.steps.iter().map(|step| step.world).collect();
        worlds.dedup();
        worlds
    }

    /// Every step was done, up to `n_steps`, and none was left out after a resume.
    pub(crate) fn check_steps(&self, n_steps: u64) -> Result<(), String> {
        let mut before = 0;
        for Step { step, loss, .. } in &self.steps {
            if *step > before + 1 || !loss.is_finite() {
                return Err(format!("step {step} with loss {loss} after step {before}"));
            }
            before = *step;
        }
        if before == n_steps { Ok(()) } else { Err(format!("{before} steps, expected {n_steps}")) }
    }

    /// The last step of which the run knew that its checkpoint is committed: it went on after it.
    pub(crate) fn last_commit(&self) -> u64 {
        let went_on = |step: &u64| self.steps.iter().any(|done| done.step == step + 1);
        self.saved.keys().copied().filter(went_on).max().unwrap_or(0)
    }

    /// The step that was resumed last; 0 if none was.
    pub(crate) fn last_resumed(&self) -> u64 {
        self.resumed.last().map_or(0, |(step, _)| *step)
    }

    /// What each world resumed has the bits of what was saved at that step. Returns how often it was.
    pub(crate) fn check_resumes(&self) -> Result<usize, String> {
        for (step, digest) in &self.resumed {
            let saved = self
                .saved
                .get(step)
                .ok_or(format!("step {step} was resumed, but its digest never logged"))?;
            if saved != digest {
                return Err(format!("step {step} was saved with digest {saved} and resumed with {digest}"));
            }
        }
        Ok(self.resumed.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "step 1 2.5 4\nstep 2 2 4\nsaved 2 aa\nstep 3 1.5 4\nresumed 2 aa\nstep 3 1.5 3\nstep 4 1 3\nste";

    #[test]
    fn a_run_is_read_and_whole() {
        let log = Log::parse(TEXT);
        assert_eq!((log.worlds(), log.last_step(), log.first_loss()), (vec![4, 3], 4, 2.5));
        assert_eq!((log.check_steps(4), log.check_resumes()), (Ok(()), Ok(1)));
        assert!(log.check_steps(5).is_err());
        assert_eq!((log.last_commit(), log.last_resumed()), (2, 2));
    }

    #[test]
    fn a_step_left_out_a_loss_that_is_none_and_other_bits_are_found() {
        assert!(Log::parse("step 1 2 4\nstep 3 2 4\n").check_steps(3).is_err());
        assert!(Log::parse("step 1 NaN 4\n").check_steps(1).is_err());
        assert!(Log::parse(&TEXT.replace("resumed 2 aa", "resumed 2 ab")).check_resumes().is_err());
        assert!(Log::parse(&TEXT.replace("resumed 2 aa", "resumed 1 aa")).check_resumes().is_err());
    }
}
