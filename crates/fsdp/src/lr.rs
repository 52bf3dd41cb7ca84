//! Learning rates by step, as plain functions: hand the result to [`Optimizer::set_lr`](crate::Optimizer::set_lr), or, for
//! groups with rates of their own, the result for each rate that they began with to
//! [`Optimizer::set_group_lr`](crate::Optimizer::set_group_lr).

/// Grows evenly from `base / n_warmup` at step 0 to `base` at step `n_warmup - 1`, and stays there.
///
/// # Source
/// `torch.optim.lr_scheduler.LinearLR(start_factor=1 / n_warmup, total_iters=n_warmup - 1)`.
pub fn linear_warmup(base: f64, step: usize, n_warmup: usize) -> f64 {
    base * ((step + 1) as f64 / n_warmup.max(1) as f64).min(1.0)
}

/// Falls along half a cosine from `base` at step 0 to `least` at step `n_steps`, and stays there.
///
/// # Source
/// `torch.optim.lr_scheduler.CosineAnnealingLR(T_max=n_steps, eta_min=least)`, its closed form.
pub fn cosine(base: f64, least: f64, step: usize, n_steps: usize) -> f64 {
    let done = (step as f64 / n_steps.max(1) as f64).min(1.0);
    least + (base - least) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
}

/// [`linear_warmup`] for `n_warmup` steps, then [`cosine`] until step `n_steps`.
pub fn warmup_then_cosine(base: f64, least: f64, step: usize, n_warmup: usize, n_steps: usize) -> f64 {
    match step.checked_sub(n_warmup) {
        None => linear_warmup(base, step, n_warmup),
        Some(step) => cosine(base, least, step, n_steps.saturating_sub(n_warmup)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, expected: f64) {
        assert!((got - expected).abs() < 1e-12, "{got} for {expected}");
    }

    #[test]
    fn rates_are_torchs_at_the_ends_and_between() {
        for (step, expected) in [(0, 0.05), (1, 0.1), (3, 0.2), (9, 0.2)] {
            close(linear_warmup(0.2, step, 4), expected);
        }
        for (step, expected) in [(0, 0.2), (5, 0.11), (10, 0.02), (99, 0.02)] {
            close(cosine(0.2, 0.02, step, 10), expected);
        }
        for (step, expected) in [(0, 0.1), (1, 0.2), (2, 0.2), (4, 0.1), (6, 0.0)] {
            close(warmup_then_cosine(0.2, 0.0, step, 2, 6), expected);
        }
    }

    #[test]
    fn no_steps_at_all_are_no_division_by_zero() {
        close(linear_warmup(0.2, 0, 0), 0.2);
        close(cosine(0.2, 0.1, 0, 0), 0.2);
        close(warmup_then_cosine(0.2, 0.1, 5, 5, 5), 0.2);
    }
}
