//! Figures beside their limits, printed as a page for benches/results.

use std::time::{Duration, Instant};

/// Batches of which the median counts, and the least time of one.
const BATCHES: usize = 5;
const BATCH: Duration = Duration::from_millis(20);

/// What a figure counts, and in what it is shown.
#[derive(Clone, Copy)]
pub enum Amount {
    /// Bytes that are read or written: GB/s.
    Bytes(f64),
    /// Multiplications and additions: TFLOP/s.
    Operations(f64),
    /// Tokens: tok/s.
    Tokens(f64),
}

/// Prints the head of a table.
pub fn head(title: &str) {
    println!("\n## {title}\n\n| what | time | rate | limit | share |\n| --- | --- | --- | --- | --- |");
}

/// Prints a figure: `amount` in `seconds`, where at best `limit` of it go in a second.
pub fn row(what: &str, seconds: f64, amount: Amount, limit: Option<f64>) {
    let (amount, scale, unit) = match amount {
        Amount::Bytes(bytes) => (bytes, 1e9, "GB/s"),
        Amount::Operations(operations) => (operations, 1e12, "TFLOP/s"),
        Amount::Tokens(tokens) => (tokens, 1.0, "tok/s"),
    };
    let shown = |rate: f64| format!("{:.1} {unit}", rate / scale);
    let time = if seconds < 0.1 { format!("{:.1} µs", 1e6 * seconds) } else { format!("{seconds:.2} s") };
    let (limit, share) = match limit {
        Some(limit) => (shown(limit), format!("{:.0} %", 100.0 * amount / seconds / limit)),
        None => (String::new(), String::new()),
    };
    println!("| {what} | {time} | {} | {limit} | {share} |", shown(amount / seconds));
}

/// Seconds of one `run`: the median of several batches, each as long as it must be to be timed.
/// `wait` ends when all that was queued is done.
pub fn seconds(mut run: impl FnMut(), wait: impl Fn()) -> f64 {
    let mut batch = |count: u32| {
        wait();
        let start = Instant::now();
        (0..count).for_each(|_| run());
        wait();
        start.elapsed()
    };
    // The first run loads kernels.
    batch(1);
    let once = batch(1).max(Duration::from_nanos(100));
    let count = u32::try_from(BATCH.as_nanos() / once.as_nanos()).unwrap_or(u32::MAX).max(1);
    median((0..BATCHES).map(|_| batch(count).as_secs_f64() / f64::from(count)))
}

/// The middle of several numbers.
pub fn median(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut numbers: Vec<f64> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}
