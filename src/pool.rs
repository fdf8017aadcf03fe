//! Threads that stay: a region of tasks begins within a microsecond of the one before it.
//!
//! The caller takes part in its region. Workers start with the first one that has tasks for them; they
//! wait for the next one actively for [`SPIN`], then sleep. Regions do not nest: one that is asked for
//! while another runs is run by its caller alone.
#![expect(unsafe_code, reason = "tasks borrow what outlives their region, and write disjoint parts of it")]

use std::any::Any;
use std::cell::UnsafeCell;
use std::fmt;
use std::marker::PhantomData;
use std::mem::transmute;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::slice::from_raw_parts_mut;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::simd::Isa;

/// How long a worker waits actively for the next region.
const SPIN: Duration = Duration::from_micros(100);
/// After this, what is waited for is not computed but read.
const LONG: Duration = Duration::from_millis(20);
/// Looks at what is waited for between two looks at the clock.
const LOOKS: usize = 64;

/// Threads that share the tasks of a region, and the vector instructions that they use.
pub struct Pool {
    isa: Isa,
    /// `None` for one on each core.
    wanted: Option<NonZeroUsize>,
    workers: OnceLock<Workers>,
    /// Whether a region runs.
    busy: AtomicBool,
}

struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What each task of a region does.
type Task = &'static (dyn Fn(usize) + Sync);

/// A word that threads contend for, on cache lines of its own.
#[repr(align(128))]
struct Line(AtomicUsize);

/// The numbers of tasks that a thread has before it: the first one in the low half, the end in the
/// high one. It takes them from the front, and a thread that has none left from the back, so that
/// each goes through memory in order, and finds there what it has asked for ahead.
#[repr(align(128))]
struct Share(AtomicU64);

struct Shared {
    /// Tasks that nobody has taken yet. Who takes one may read `region`, and finds its number in one of `shares`.
    untaken: Line,
    /// One for each thread, the caller's first.
    shares: Vec<Share>,
    /// Tasks that are not done.
    undone: Line,
    /// What each task does. Written only while none is undone.
    region: UnsafeCell<Task>,
    /// Workers that sleep, or are about to.
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
    /// What the first task that panicked said.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: all fields but `region` are made to be shared. `region` is written by the caller of a
// region before it releases `untaken`, and read by threads that have taken a task, which the caller
// waits for before it returns; `Pool::busy` lets one caller in at a time.
unsafe impl Sync for Shared {}

impl Default for Pool {
    /// One thread for each core that this process may use; two threads of a core count as one.
    fn default() -> Self {
        Self { isa: Isa::best(), wanted: None, workers: OnceLock::new(), busy: AtomicBool::new(false) }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("isa", &self.isa).field("threads", &self.wanted).finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool of `threads`, one of which is the caller's; of fewer where the system refuses them.
    pub fn new(threads: NonZeroUsize) -> Self {
        Self { wanted: Some(threads), ..Self::default() }
    }

    /// The same threads with other instructions.
    #[must_use]
    pub fn with_isa(mut self, isa: Isa) -> Self {
        self.isa = isa;
        self
    }

    /// The vector instructions: the widest that there are, unless it was given others.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads, with the caller's.
    pub fn threads(&self) -> usize {
        self.workers().threads.len() + 1
    }

    fn workers(&self) -> &Workers {
        self.workers.get_or_init(|| {
            let cores = || num_cpus::get_physical().min(thread::available_parallelism().map_or(1, usize::from));
            Workers::start(self.wanted.map_or_else(cores, usize::from))
        })
    }

    /// Runs `task` with every number below `tasks`, each once, on whichever thread is free.
    ///
    /// # Panics
    /// As the first task that does, once all are done.
    pub fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        let is_alone = tasks <= 1 || u32::try_from(tasks).is_err() || self.threads() == 1;
        if is_alone || self.busy.swap(true, Ordering::Acquire) {
            (0..tasks).for_each(task);
            return;
        }
        let shared = &*self.workers().shared;
        let task: &(dyn Fn(usize) + Sync) = &task;
        // SAFETY: only the lifetime changes. A thread calls `task` only after it took one of the
        // region's tasks, and this function returns only after all of them are done.
        let task = unsafe { transmute::<&(dyn Fn(usize) + Sync), Task>(task) };
        // SAFETY: no region runs (`busy` was not set), so no other thread reads this.
        unsafe { *shared.region.get() = task };
        shared.undone.0.store(tasks, Ordering::Relaxed);
        for (at, share) in shared.shares.iter().enumerate() {
            share.set(tasks * at / shared.shares.len()..tasks * (at + 1) / shared.shares.len());
        }
        // Before the sleepers are counted; see `sleep_until_called`.
        shared.untaken.0.store(tasks, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.sleep));
            shared.wake.notify_all();
        }
        shared.take_tasks(0);
        wait(None, || shared.undone.0.load(Ordering::Acquire) == 0);
        let panic = lock(&shared.panic).take();
        self.busy.store(false, Ordering::Release);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// What `task` gives for every number below `tasks`, in their order. No task is begun after one
    /// of a lower number has failed.
    ///
    /// # Errors
    /// That of the lowest number that fails.
    pub fn try_map<T: Send, E: Send>(
        &self,
        tasks: usize,
        task: impl Fn(usize) -> Result<T, E> + Sync,
    ) -> Result<Vec<T>, E> {
        let failed = AtomicUsize::new(tasks);
        let mut results: Vec<_> = (0..tasks).map(|_| None).collect();
        self.chunks(&mut results, 1, |number, results| {
            if number < failed.load(Ordering::Relaxed) {
                let result = task(number);
                if result.is_err() {
                    failed.fetch_min(number, Ordering::Relaxed);
                }
                results[0] = Some(result);
            }
        });
        results.into_iter().flatten().collect()
    }

    /// Runs `task` with each piece of `len` elements of `values`, the last of which may be shorter, and its number.
    pub fn chunks<T: Send>(&self, values: &mut [T], len: usize, task: impl Fn(usize, &mut [T]) + Sync) {
        let whole = Parts::of(values);
        self.run(whole.len.div_ceil(len), |index| {
            let start = index * len;
            // SAFETY: each number is given once, and pieces of different numbers share no element.
            task(index, unsafe { whole.part(start, len.min(whole.len - start)) });
        });
    }

    /// Runs `task` with tiles of `width` columns and `height` tokens of each table, those at the ends smaller,
    /// and with the number of the table, in one region.
    pub fn tiles(&self, tables: &mut [Table], width: usize, height: usize, task: impl Fn(usize, Columns) + Sync) {
        let grids = tables.iter_mut().map(|Table { values, stride }| {
            let across = stride.div_ceil(width);
            let tasks = across * (values.len() / *stride).div_ceil(height);
            (Parts::of(values), *stride, across, tasks)
        });
        let grids: Vec<_> = grids.collect();
        self.run(grids.iter().map(|grid| grid.3).sum(), |mut index| {
            for (table, &(whole, stride, across, tasks)) in grids.iter().enumerate() {
                if index < tasks {
                    let (start, first) = (index % across * width, index / across * height);
                    let tokens = first..(whole.len / stride).min(first.saturating_add(height));
                    return task(table, Columns { whole, stride, start, width: width.min(stride - start), tokens });
                }
                index -= tasks;
            }
        });
    }
}

impl Workers {
    /// All but one of as many `threads`.
    fn start(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            untaken: Line(AtomicUsize::new(0)),
            shares: (0..threads).map(|_| Share(AtomicU64::new(0))).collect(),
            undone: Line(AtomicUsize::new(0)),
            region: UnsafeCell::new(&|_| ()),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let worker = |at: usize| {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name(format!("evenkeel-{at}")).spawn(move || shared.work(at)).ok()
        };
        let threads = (1..threads).map_while(worker).collect();
        Self { shared, threads }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.sleep));
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A worker catches the panics of its tasks, so there is nothing to hear of.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self, thread: usize) {
        while !self.stop.load(Ordering::Relaxed) {
            if !wait(Some(SPIN), || self.is_called()) {
                self.sleep_until_called();
            }
            self.take_tasks(thread);
        }
    }

    fn is_called(&self) -> bool {
        self.untaken.0.load(Ordering::SeqCst) > 0 || self.stop.load(Ordering::SeqCst)
    }

    /// A caller stores its tasks and then looks for sleepers; a worker counts itself as one and
    /// then looks for tasks. So one of them sees the other.
    fn sleep_until_called(&self) {
        let mut guard = lock(&self.sleep);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while !self.is_called() {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Takes tasks and does them until none is left to take.
    fn take_tasks(&self, thread: usize) {
        let one_less = |untaken: usize| untaken.checked_sub(1);
        while self.untaken.0.fetch_update(Ordering::Acquire, Ordering::Relaxed, one_less).is_ok() {
            // SAFETY: this thread holds a task of the region, so nobody writes here before it is done.
            let task = unsafe { *self.region.get() };
            let number = self.number(thread);
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(number))) {
                lock(&self.panic).get_or_insert(panic);
            }
            self.undone.0.fetch_sub(1, Ordering::Release);
        }
    }

    /// The number of a task that `thread` has taken: there are as many numbers as tasks taken.
    fn number(&self, thread: usize) -> usize {
        let others = (1..self.shares.len()).map(|ahead| &self.shares[(thread + ahead) % self.shares.len()]);
        loop {
            let from_others = || others.clone().find_map(|share| share.take(|first, end| (first, end - 1, end - 1)));
            let number = self.shares[thread].take(|first, end| (first + 1, end, first)).or_else(from_others);
            if let Some(number) = number {
                return number;
            }
        }
    }
}

impl Share {
    fn set(&self, numbers: Range<usize>) {
        self.0.store((numbers.end as u64) << 32 | numbers.start as u64, Ordering::Relaxed);
    }

    /// Takes a number, if there are any: of the first and the end `taken` makes those that remain and the number.
    fn take(&self, taken: impl Fn(u64, u64) -> (u64, u64, u64)) -> Option<usize> {
        const LOW: u64 = u32::MAX as u64;
        let mut number = None;
        let update = |both: u64| {
            let (first, end) = (both & LOW, both >> 32);
            (first < end).then(|| {
                let (first, end, taken) = taken(first, end);
                number = usize::try_from(taken).ok();
                end << 32 | first
            })
        };
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update).ok().and(number)
    }
}

/// Waits actively until `is_over`, or until `limit` is over; then it is false.
fn wait(limit: Option<Duration>, is_over: impl Fn() -> bool) -> bool {
    for _ in 0..LOOKS {
        if is_over() {
            return true;
        }
        std::hint::spin_loop();
    }
    let start = Instant::now();
    loop {
        for _ in 0..LOOKS {
            if is_over() {
                return true;
            }
            std::hint::spin_loop();
        }
        if limit.is_some_and(|limit| start.elapsed() > limit) {
            return false;
        }
        // Another thread may need this core, perhaps the one that is waited for; that may itself wait for a file.
        if start.elapsed() < LONG { thread::yield_now() } else { thread::sleep(SPIN) }
    }
}

/// The lock, though a thread that had it may have panicked: what it holds is whole all the same, or scratch.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A slice that is handed out in parts.
#[derive(Clone, Copy)]
struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: as a mutable slice may be sent, so may parts of it that share nothing.
unsafe impl<T: Send> Send for Parts<'_, T> {}
// SAFETY: as above; only `part` gives access, and there its caller sees to it that parts share nothing.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    fn of(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// # Safety
    /// No two parts that are held at once share an element.
    unsafe fn part(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start, "{start} + {len} is beyond {}", self.len);
        // SAFETY: the elements lie in the slice that is borrowed for 'a, and the caller has them alone.
        unsafe { from_raw_parts_mut(self.start.add(start), len) }
    }
}

/// `[tokens][stride]` values.
pub struct Table<'a> {
    /// The values.
    pub values: &'a mut [f32],
    /// Values of a token.
    pub stride: usize,
}

/// Some columns of a [`Table`], of all its tokens or of some, which one task has for itself.
pub struct Columns<'a> {
    whole: Parts<'a, f32>,
    stride: usize,
    start: usize,
    width: usize,
    tokens: Range<usize>,
}

impl Columns<'_> {
    /// The first of the columns.
    pub fn start(&self) -> usize {
        self.start
    }

    /// How many columns there are.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The tokens that there are.
    pub fn tokens(&self) -> Range<usize> {
        self.tokens.clone()
    }

    /// The columns' values of a token.
    ///
    /// # Panics
    /// There is no such token.
    pub fn row(&mut self, token: usize) -> &mut [f32] {
        assert!(self.tokens.contains(&token), "token {token} is beyond {:?}", self.tokens);
        // SAFETY: every value is in the columns of one task only, and `self` is borrowed while the row is.
        unsafe { self.whole.part(token * self.stride + self.start, self.width) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    fn pool(threads: usize) -> Pool {
        Pool::new(NonZeroUsize::new(threads).unwrap())
    }

    #[test]
    fn every_task_is_done_once() {
        for threads in [1, 2, 3, 8] {
            let pool = pool(threads);
            for tasks in [0, 1, 2, 7, 1000] {
                let done: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..50 {
                    pool.run(tasks, |task| _ = done[task].fetch_add(1, Ordering::Relaxed));
                }
                assert!(
                    done.iter().all(|count| count.load(Ordering::Relaxed) == 50),
                    "{threads} threads, {tasks} tasks"
                );
            }
        }
    }

    #[test]
    fn tasks_run_side_by_side_even_after_a_sleep() {
        let pool = pool(2);
        wait(None, || pool.workers().shared.sleepers.load(Ordering::SeqCst) == 1);
        for pause in [Duration::ZERO, 5 * SPIN, Duration::from_millis(20)] {
            thread::sleep(pause);
            // Each task waits for the other, so one thread alone would never end.
            let arrived = AtomicUsize::new(0);
            pool.run(2, |_| {
                arrived.fetch_add(1, Ordering::SeqCst);
                wait(None, || arrived.load(Ordering::SeqCst) == 2);
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = pool(3);
        for bad in [0, 5, 99] {
            let done = AtomicUsize::new(0);
            let panic = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, |task| {
                    assert!(task != bad, "task {task}");
                    done.fetch_add(1, Ordering::Relaxed);
                });
            }));
            assert_eq!(*panic.unwrap_err().downcast::<String>().unwrap(), format!("task {bad}"));
            assert_eq!(done.into_inner(), 99);
        }
        pool.run(10, |_| ());
    }

    #[test]
    fn a_panic_reaches_no_other_caller() {
        let pool = pool(2);
        let turn = Barrier::new(2);
        thread::scope(|scope| {
            let caller = scope.spawn(|| {
                let task = |task: usize| {
                    if task == 0 {
                        resume_unwind(Box::new(()));
                    }
                    wait(None, || lock(&pool.workers().shared.panic).is_some());
                    turn.wait();
                    turn.wait();
                };
                catch_unwind(AssertUnwindSafe(|| pool.run(2, task)))
            });
            turn.wait();
            let panic = lock(&pool.workers().shared.panic);
            turn.wait();
            wait(None, || pool.workers().shared.undone.0.load(Ordering::SeqCst) == 0);
            // All is done, and nobody else may begin before the caller has its panic.
            thread::sleep(Duration::from_millis(20));
            assert!(pool.busy.load(Ordering::SeqCst));
            drop(panic);
            assert!(caller.join().unwrap().is_err());
        });
        pool.run(10, |_| ());
    }

    #[test]
    fn a_region_in_a_region_runs_inline() {
        let pool = pool(2);
        let count = AtomicUsize::new(0);
        pool.run(4, |_| pool.run(5, |_| _ = count.fetch_add(1, Ordering::Relaxed)));
        assert_eq!(count.into_inner(), 20);
    }

    #[test]
    fn dropping_a_pool_ends_its_threads() {
        let held = Arc::new(());
        let pool = pool(4);
        let shared = Arc::downgrade(&pool.workers().shared);
        let inside = Arc::clone(&held);
        pool.run(8, move |_| _ = Arc::strong_count(&inside));
        drop(pool);
        assert_eq!((shared.strong_count(), Arc::strong_count(&held)), (0, 1));
    }

    #[test]
    fn threads_start_with_the_first_region_that_has_tasks_for_them() {
        let pool = pool(2);
        pool.run(1, |_| ());
        assert!(pool.workers.get().is_none());
        pool.run(2, |_| ());
        assert!(pool.workers.get().is_some());
    }

    #[test]
    fn results_are_in_order_and_so_is_the_error() {
        for threads in [1, 3] {
            let pool = pool(threads);
            assert_eq!(pool.try_map(100, Ok::<_, usize>).unwrap(), (0..100).collect::<Vec<_>>());
            for _ in 0..50 {
                let odd_from_50 = |number| if number >= 50 && number % 2 == 1 { Err(number) } else { Ok(number) };
                assert_eq!(pool.try_map(100, odd_from_50), Err(51));
            }
        }
    }

    #[test]
    fn chunks_are_the_pieces_of_a_slice() {
        for (len, piece) in [(0, 3), (1, 3), (3, 3), (10, 3), (1000, 1)] {
            let mut values = vec![0; len];
            pool(3).chunks(&mut values, piece, |index, values| values.fill(index + 1));
            let wanted: Vec<_> = (0..len).map(|at| at / piece + 1).collect();
            assert_eq!(values, wanted);
        }
    }

    #[test]
    fn columns_are_those_of_every_token() {
        let (tokens, strides, width) = (3, [10, 4, 1], 4);
        let mut values = strides.map(|stride| vec![0.0; tokens * stride]);
        let mut tables: Vec<_> =
            values.iter_mut().zip(strides).map(|(values, stride)| Table { values, stride }).collect();
        pool(3).tiles(&mut tables, width, usize::MAX, |table, mut columns| {
            let index = columns.start() / width;
            assert_eq!((columns.start(), columns.row(0).len()), (index * width, columns.width()));
            for token in 0..tokens {
                columns.row(token).fill((100 * table + 10 * token + index) as f32);
            }
        });
        for (table, (values, stride)) in values.iter().zip(strides).enumerate() {
            for (at, value) in values.iter().enumerate() {
                assert_eq!(*value, (100 * table + 10 * (at / stride) + at % stride / width) as f32);
            }
        }
        let mut values = [0.0; 6];
        let table = Table { values: &mut values, stride: 3 };
        pool(2).tiles(&mut [table], 2, 2, |_, mut columns| {
            let number = columns.start() / 2 + 1;
            columns.row(1).fill(number as f32);
        });
        assert_eq!(values, [0.0, 0.0, 0.0, 1.0, 1.0, 2.0]);
    }

    #[test]
    fn tiles_cover_a_table_once() {
        let (tokens, stride, width, height) = (5, 7, 3, 2);
        let mut values = vec![0.0; tokens * stride];
        pool(3).tiles(&mut [Table { values: &mut values, stride }], width, height, |_, mut tile| {
            let (across, down) = (tile.start() / width, tile.tokens().start / height);
            for token in tile.tokens() {
                tile.row(token).iter_mut().for_each(|value| *value += (10 * down + across + 1) as f32);
            }
        });
        for (at, value) in values.iter().enumerate() {
            assert_eq!(*value, (at / stride / height * 10 + at % stride / width + 1) as f32);
        }
    }

    #[test]
    #[should_panic(expected = "is beyond")]
    fn a_row_that_is_not_there() {
        let table = Table { values: &mut [0.0; 6], stride: 3 };
        pool(1).tiles(&mut [table], 3, 2, |_, mut columns| columns.row(2).fill(1.0));
    }
}
