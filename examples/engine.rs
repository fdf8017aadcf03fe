//! Several threads ask one model: `cargo run --example engine -- tests/fixtures/ferris-7m`.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use evenkeel::{
    Checkpoint, EngineOptions, GenerateOptions, Inventory, LoadOptions, Plan, PlanOptions, Result, Sampling,
};

fn main() -> Result<()> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "tests/fixtures/ferris-7m".to_owned());
    let checkpoint = Checkpoint::open(path)?;
    // Room for four sequences at once; others wait.
    let options = PlanOptions { batch: Some(4), ..PlanOptions::default() };
    let plan = Plan::new(&checkpoint, &Inventory::this_machine()?, options)?;
    let engine = plan.load(LoadOptions::default(), |_event| ())?.engine(&EngineOptions::default())?;
    let answers: Result<Vec<String>> = std::thread::scope(|scope| {
        let ask = |prompt: &'static str| {
            let engine = engine.clone();
            scope.spawn(move || {
                let sampling = Sampling { temperature: 0.7, seed: 1, ..Sampling::greedy() };
                let options = GenerateOptions { sampling, max_new_tokens: Some(24), ..GenerateOptions::default() };
                // Pieces come as they are made; an answer that is dropped ends.
                let text: Result<String> = engine.generate(prompt, options)?.map(|piece| Ok(piece?.text)).collect();
                Ok(format!("{prompt}{}", text?))
            })
        };
        let threads = ["Ownership is", "A trait", "Cargo", "fn main() {", "Lifetimes are"].map(ask);
        threads.into_iter().map(|thread| thread.join().expect("a thread that does not panic")).collect()
    });
    for answer in answers? {
        println!("{answer}\n");
    }
    engine.close();
    engine.wait()
}
