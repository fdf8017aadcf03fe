//! Several sequences on GPUs, on the stand-in for the driver, in this process.

#[path = "support/fake_cuda.rs"]
mod fake_cuda;
mod support;

use evenkeel::backend::{Draws, Run};
use evenkeel::bytes::Bytes;
use evenkeel::checkpoint::Checkpoint;
use evenkeel::engine::Sequence;
use evenkeel::generate::{GenerateOptions, Sampling};
use evenkeel::loader::Model;
use evenkeel::plan::{Plan, PlanOptions};
use evenkeel::quant::Scheme;
use support::fixture;
use support::models::{LOGITS, extent_of, load, machine, map, options, samplings};

const GPUS: &str = "24GiB,8GiB";

/// The tokens that a device chooses behind prompts, those of all in the same steps, one of which runs ahead. Each has a
/// slot, and its pages are far from each other.
fn chosen_together(model: &mut Model, texts: &[(usize, Vec<u32>, Sampling)], steps: usize) -> Vec<Vec<u32>> {
    let extent = extent_of(&model.plan);
    let each = extent.pages / extent.sequences;
    let page = |slot: usize, at: usize| u32::try_from(extent.pages - 1 - (at * extent.sequences + slot)).unwrap();
    let pages: Vec<Vec<u32>> = texts.iter().map(|(slot, ..)| (0..each).map(|at| page(*slot, at)).collect()).collect();
    let mut draws: Vec<_> = texts.iter().map(|(.., sampling)| Draws::new(sampling.seed)).collect();
    let runs = |tokens: &dyn Fn(usize) -> (usize, usize)| -> Vec<Run> {
        let run = |(at, (slot, ..)): (usize, &(usize, Vec<u32>, Sampling))| {
            let (position, tokens) = tokens(at);
            Run { slot: *slot, pages: &pages[at], position, tokens, length: position + tokens }
        };
        texts.iter().enumerate().map(run).collect()
    };
    let pipeline = model.core().pipeline();
    for (slot, prompt, sampling) in texts {
        pipeline.chooser().unwrap().begin(*slot, &sampling.choice(), prompt).unwrap();
    }
    let prompts: Vec<u32> = texts.iter().flat_map(|(_, prompt, _)| prompt.clone()).collect();
    pipeline.run(&prompts, &runs(&|at| (0, texts[at].1.len()))).unwrap();
    let mut end = 0;
    let last = |(_, prompt, _): &(usize, Vec<u32>, Sampling)| {
        end += prompt.len();
        end - 1
    };
    let rows: Vec<usize> = texts.iter().map(last).collect();
    let of: Vec<_> = texts.iter().zip(&mut draws).map(|((slot, ..), draws)| (*slot, draws.draw())).collect();
    pipeline.choose(&rows, &of).unwrap();
    let chooser = pipeline.chooser().unwrap();
    let mut tokens = vec![Vec::new(); texts.len()];
    for step in 0..=steps {
        if step < steps {
            let numbers: Vec<u32> = draws.iter_mut().map(Draws::draw).collect();
            chooser.step(None, &runs(&|at| (texts[at].1.len() + step, 1)), &numbers).unwrap();
        }
        for (tokens, chosen) in tokens.iter_mut().zip(chooser.chosen().unwrap()) {
            assert!(chosen.is_finite);
            tokens.push(chosen.token);
        }
    }
    // Told in place of those that were chosen last, they give the same.
    let told: Vec<u32> = tokens.iter().map(|tokens| tokens[steps - 1]).collect();
    if texts.iter().all(|(.., sampling)| *sampling == Sampling::greedy()) {
        chooser.step(Some(&told), &runs(&|at| (texts[at].1.len() + steps - 1, 1)), &vec![0; texts.len()]).unwrap();
        let again: Vec<u32> = chooser.chosen().unwrap().iter().map(|chosen| chosen.token).collect();
        assert_eq!(again, tokens.iter().map(|tokens| tokens[steps]).collect::<Vec<_>>());
    }
    tokens
}

#[test]
fn several_sequences_are_chosen_for_as_each_alone() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    for (name, batch, rows, steps, graphs) in [
        // Three rows and one that pads; in each a page ends.
        ("parity/llama", 4, 3, 5, "1"),
        ("parity/gpt2", 4, 3, 4, "0"),
        ("parity/gemma2", 3, 3, 4, "1"),
        // More rows than logits have room for, and than those of few tokens.
        ("parity/llama", 20, 18, 2, "1"),
    ] {
        fake.set("GRAPHS", graphs);
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        let options =
            PlanOptions { batch: Some(batch), ..options(Scheme::None, &map(&checkpoint, &["cuda:0"]), Some(128)) };
        let mut model = load(&Plan::new(&checkpoint, &machine(), options).unwrap(), true).unwrap();
        for device in &model.report.devices {
            assert_eq!(device.planned, device.measured, "{name}: {}", device.id);
        }
        // What is drawn of many may differ by rounding.
        for mixed in [false, true].into_iter().take(if rows > 3 { 1 } else { 2 }) {
            let text = |at: usize| {
                let length = if rows > 3 { 5 + at % 3 } else { 62 - 20 * at };
                let prompt = (1..=length).map(|token| u32::try_from(token * (at + 2) % 50).unwrap()).collect();
                (batch - 1 - at, prompt, samplings()[if mixed { at % 3 } else { 0 }].clone())
            };
            let texts: Vec<_> = (0..rows).map(text).collect();
            let before = fake.stat("graph_launches", 0);
            let together = chosen_together(&mut model, &texts, steps);
            let repeated = fake.stat("graph_launches", 0) - before;
            // The load has made ready for the largest, told or chosen; of others the first step is launched.
            let wanted = if mixed { steps - 1 } else { steps + 1 };
            assert_eq!(repeated, if graphs == "1" { wanted as u64 } else { 0 }, "{name}, mixed: {mixed}");
            for (text, together) in texts.iter().zip(together) {
                let alone = (0, text.1.clone(), text.2.clone());
                assert_eq!(vec![together], chosen_together(&mut model, &[alone], steps), "{name}, mixed: {mixed}");
            }
        }
    }
    fake.set("GRAPHS", "1");
    fake.assert_nothing_left("sequences");
}

#[test]
fn sequences_that_an_engine_runs_on_a_gpu_are_what_they_are_alone() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    for (name, devices, lengths, new, share) in [
        // More than there are places for, some longer than a page.
        ("parity/llama", &["cuda:0"][..], (3, 15), 8, 1),
        // Four pages: two that begin with one each come to three.
        ("parity/llama", &["cuda:0"], (58, 1), 75, 3),
        ("parity/gemma2", &["cuda:0", "cuda:1"], (3, 15), 8, 1),
        ("parity/qwen3_moe", &["cuda:0"], (3, 15), 8, 1),
    ] {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        let whole = PlanOptions { batch: Some(4), ..options(Scheme::None, &map(&checkpoint, devices), Some(192)) };
        let plan = Plan::new(&checkpoint, &machine(), &whole).unwrap();
        let kept: u64 = plan.modules.iter().map(|module| module.kv_cache.0).sum();
        let options = PlanOptions { kv_memory: Some(Bytes(kept / share)), ..whole };
        let mut model = load(&Plan::new(&checkpoint, &machine(), options).unwrap(), true).unwrap();
        let text = |at: u32| (1..=lengths.0 + lengths.1 * at).map(|token| token * (at + 2) % 50).collect::<Vec<u32>>();
        let penalized = Sampling { repetition_penalty: 1.1, ..Sampling::greedy() };
        let sampling = |at: u32| if at.is_multiple_of(2) { Sampling::greedy() } else { penalized.clone() };
        let texts: Vec<_> = (0..6).map(|at| (text(at), sampling(at))).collect();
        let mut alone = |(text, sampling): &(Vec<u32>, Sampling)| -> Vec<u32> {
            let sampling = sampling.clone();
            let options =
                GenerateOptions { sampling, max_new_tokens: Some(new), ignore_eos: true, ..Default::default() };
            let generation = model.generate_from(text, options).unwrap();
            generation.filter_map(|piece| piece.unwrap().token).collect()
        };
        let alone: Vec<_> = texts.iter().map(&mut alone).collect();
        let core = model.core();
        core.clear().unwrap();
        let mut add = |(text, sampling): &(Vec<u32>, Sampling)| core.add(Sequence::new(text, new, sampling)).unwrap();
        let ids: Vec<u64> = texts.iter().map(&mut add).collect();
        let (mut tokens, mut ahead) = (vec![Vec::new(); texts.len()], false);
        while core.state().running + core.state().waiting > 0 {
            for stepped in core.step().unwrap() {
                let at = ids.iter().position(|id| *id == stepped.id).unwrap();
                tokens[at].push(stepped.token.unwrap().0);
            }
            ahead |= core.is_ahead();
        }
        assert_eq!(tokens, alone, "{name}");
        assert_eq!(ahead, name == "parity/llama", "{name}");
        assert_eq!((core.state().preemptions > 0, core.state().pages_used), (share > 1, 0), "{name}");
    }
    fake.assert_nothing_left("sequences");
}

/// The log probability of every token behind each of a sequence, by the token's number, as an engine tells it.
type Told = Vec<(u32, Vec<f32>)>;

/// Runs sequences that come one after the other, `apart` steps between them.
fn told(model: &mut Model, texts: &[Vec<u32>], new: usize, apart: usize) -> Vec<Told> {
    let vocabulary = model.plan.checkpoint().config.vocab_size;
    let core = model.core();
    let (mut ids, mut all) = (Vec::new(), vec![Told::new(); texts.len()]);
    for step in 0.. {
        if ids.len() < texts.len() && step % apart == 0 {
            let sequence = Sequence::new(&texts[ids.len()], new, &Sampling::greedy()).with_logprobs(Some(vocabulary));
            ids.push(core.add(sequence).unwrap());
        }
        for stepped in core.step().unwrap() {
            let (token, logprobs) = stepped.token.unwrap();
            let mut by_token = logprobs.unwrap().top;
            by_token.sort_unstable_by_key(|(token, _)| *token);
            let at = ids.iter().position(|id| *id == stepped.id).unwrap();
            all[at].push((token, by_token.into_iter().map(|(_, logprob)| logprob).collect()));
        }
        if ids.len() == texts.len() && core.state().running + core.state().waiting == 0 {
            break;
        }
    }
    all
}

/// A beginning that was kept, and others beside it, change what comes by no more than rounding.
#[test]
fn what_is_kept_on_a_gpu_is_what_would_be_computed() {
    let Some((fake, _turn)) = fake_cuda::load(GPUS) else { return };
    for capability in ["8.6", "7.5"] {
        fake.set("CC", capability);
        let checkpoint = Checkpoint::open(fixture("parity/llama")).unwrap();
        let options =
            PlanOptions { batch: Some(8), ..options(Scheme::None, &map(&checkpoint, &["cuda:0"]), Some(256)) };
        let plan = Plan::new(&checkpoint, &machine(), options).unwrap();
        // All begin with the same two pages.
        let token = |at: u32, token: u32| (token * token * 31 + token / 128 * at) % 300;
        let texts: Vec<Vec<u32>> = (0..10).map(|at| (0..130 + 7 * at).map(|of| token(at, of)).collect()).collect();
        // Each by itself, in a model that has kept nothing.
        let alone: Vec<Told> = texts
            .iter()
            .map(|text| told(&mut load(&plan, false).unwrap(), std::slice::from_ref(text), 6, 1).remove(0))
            .collect();
        let mut model = load(&plan, false).unwrap();
        for apart in [1, 3, 40] {
            let together = told(&mut model, &texts, 6, apart);
            for (at, (together, alone)) in together.iter().zip(&alone).enumerate() {
                for ((token, ours), (wanted, exact)) in together.iter().zip(alone) {
                    let most = ours.iter().zip(exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(most < LOGITS, "{capability}, text {at}, {apart} apart: {most}");
                    assert_eq!(token, wanted, "{capability}, text {at}, {apart} apart");
                }
            }
        }
        assert!(model.core().state().kept_tokens > 20 * 128, "beginnings are kept");
    }
    fake.set("CC", "8.6");
}
