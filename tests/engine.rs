//! Many sequences at once: each is what it would be alone, whoever runs beside it and however little room there is.
#![expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers")]

mod support;

use std::sync::mpsc;

use evenkeel::cancel::Cancel;
use evenkeel::checkpoint::Checkpoint;
use evenkeel::engine::{Constraint, EngineState, Sequence};
use evenkeel::generate::{EngineOptions, Event, Finish, GenerateOptions, Request, Sampling};
use evenkeel::loader::Model;
use evenkeel::plan::{Plan, PlanOptions};
use evenkeel::random::Draws;
use evenkeel::{Bytes, ErrorKind, Result};
use proptest::prelude::*;
use support::{fixture, load_plan, roomy};

fn model(name: &str, batch: usize, kv_memory: Option<Bytes>) -> Model {
    let checkpoint = Checkpoint::open(fixture(name)).unwrap();
    let options = PlanOptions {
        context: Some(checkpoint.config.max_position_embeddings.min(256)),
        chunk: Some(48),
        batch: Some(batch),
        kv_memory,
        quantize: evenkeel::Scheme::Int4.into(),
        ..PlanOptions::default()
    };
    load_plan(&Plan::new(&checkpoint, &roomy(), options).unwrap()).unwrap()
}

/// What is kept of all sequences where each has room for its context.
fn whole_room(name: &str, batch: usize) -> u64 {
    let model = model(name, batch, None);
    model.plan.modules.iter().map(|module| module.kv_cache.0).sum()
}

/// Prompts of all lengths, some of which begin alike, and how they go on.
fn texts(model: &Model, count: usize, longest: usize) -> Vec<(Vec<u32>, usize, Sampling)> {
    let vocabulary = model.plan.checkpoint().config.vocab_size;
    let mut draws = Draws::new(5);
    let warm = Sampling { temperature: 0.8, top_p: Some(0.9), ..Sampling::greedy() };
    (0..count)
        .map(|at| {
            let length = 1 + draws.below(longest);
            let mut text = Draws::new(at as u64 % 3);
            let mut tokens: Vec<u32> = (0..length).map(|_| text.below(vocabulary) as u32).collect();
            if let Some(last) = tokens.last_mut() {
                *last = draws.below(vocabulary) as u32;
            }
            let sampling = match at % 3 {
                0 => Sampling::greedy(),
                1 => Sampling { seed: at as u64, ..warm.clone() },
                _ => Sampling { repetition_penalty: 1.3, ..warm.clone() },
            };
            (tokens, 1 + draws.below(model.plan.context / 4), sampling)
        })
        .collect()
}

fn alone(model: &mut Model, (prompt, most, sampling): &(Vec<u32>, usize, Sampling)) -> Vec<u32> {
    let options = GenerateOptions {
        sampling: sampling.clone(),
        max_new_tokens: Some(*most),
        ignore_eos: true,
        ..GenerateOptions::default()
    };
    let generation = model.generate_from(prompt, options).unwrap();
    generation.filter_map(|piece| piece.unwrap().token).collect()
}

/// The tokens of all, some of which come while others are on their way.
fn together(model: &mut Model, texts: &[(Vec<u32>, usize, Sampling)]) -> (Vec<Vec<u32>>, EngineState) {
    let batch = model.plan.batch;
    let core = model.core();
    core.clear().unwrap();
    let mut tokens = vec![Vec::new(); texts.len()];
    let (mut ids, mut left) = (Vec::new(), texts.len());
    for step in 0.. {
        if ids.len() < texts.len() && (step % 3 == 0 || ids.len() < 2) {
            let (prompt, most, sampling) = &texts[ids.len()];
            ids.push(core.add(Sequence::new(prompt, *most, sampling)).unwrap());
        }
        for stepped in core.step().unwrap() {
            let at = ids.iter().position(|id| *id == stepped.id).unwrap();
            tokens[at].push(stepped.token.unwrap().0);
            left -= usize::from(tokens[at].len() == texts[at].1);
        }
        let state = core.state();
        assert!(state.pages_used <= state.pages && state.running <= batch, "{state:?}");
        if left == 0 {
            break;
        }
        assert!(step < 20_000, "it does not end");
    }
    (tokens, core.state())
}

#[test]
fn a_sequence_is_what_it_is_alone() {
    let mut preemptions = 0;
    for (name, share, is_kept) in [
        ("parity/llama", 1.0, true),
        ("parity/llama", 0.4, true),
        ("parity/gpt2", 0.4, true),
        ("parity/mixtral", 0.5, true),
        ("parity/gemma3", 1.0, false),
        ("parity/gemma3", 0.7, false),
        ("parity/llama31", 0.5, true),
        ("parity/qwen2_yarn", 0.4, true),
        ("parity/phi3", 0.4, false),
    ] {
        let batch = 6;
        let room = (whole_room(name, batch) as f64 * share) as u64;
        let mut model = model(name, batch, Some(Bytes(room)));
        let texts = texts(&model, 24, model.plan.context * 2 / 3);
        let (tokens, state) = together(&mut model, &texts);
        for (at, (text, ours)) in texts.iter().zip(&tokens).enumerate() {
            assert!(*ours == alone(&mut model, text), "{name}, {share}: text {at} of {} tokens", text.0.len());
        }
        assert_eq!((state.pages_used, state.running, state.waiting), (0, 0, 0), "{name}");
        assert!(state.preemptions == 0 || share < 1.0, "{name}, {share}: {state:?}");
        preemptions += state.preemptions;
        assert!(!is_kept || share > 0.9 || state.kept_tokens > 0 || name == "parity/gpt2", "{name}: {state:?}");
    }
    assert!(preemptions > 0, "none had to give its pages back");
}

#[test]
fn a_common_beginning_is_computed_once() {
    let mut model = model("parity/llama", 4, None);
    let beginning: Vec<u32> = (0..150).map(|at| at * 7 % 300).collect();
    let text = |last| ([&beginning[..], &[last]].concat(), 20, Sampling::greedy());
    let texts: Vec<_> = (0..4).map(text).collect();
    let before = model.core().state().kept_tokens;
    let wanted: Vec<_> = texts.iter().map(|text| alone(&mut model, text)).collect();
    let (tokens, state) = together(&mut model, &texts);
    assert_eq!(tokens, wanted);
    // Two whole pages of it, for all but the first.
    assert_eq!(state.kept_tokens - before, 7 * 128);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn steps_and_ends_in_any_order_leave_no_page(script in prop::collection::vec((0usize..5, 1usize..200, 1usize..50), 1..40)) {
        thread_local!(static MODEL: std::cell::RefCell<Model> = {
            let room = Bytes(whole_room("parity/llama", 5) / 2);
            std::cell::RefCell::new(model("parity/llama", 5, Some(room)))
        });
        MODEL.with_borrow_mut(|model| {
            let core = model.core();
            core.clear().unwrap();
            let mut ids = Vec::new();
            for (what, length, most) in script {
                match what {
                    0 | 1 => {
                        let prompt: Vec<u32> = (0..length as u32).map(|at| at % 97).collect();
                        ids.push(core.add(Sequence::new(&prompt, most, &Sampling::greedy())).unwrap());
                    }
                    2 if !ids.is_empty() => core.remove(ids.swap_remove(length % ids.len())),
                    _ => drop(core.step().unwrap()),
                }
            }
            let mut steps = 0;
            while core.state().running + core.state().waiting > 0 {
                core.step().unwrap();
                steps += 1;
                assert!(steps < 10_000, "it does not end");
            }
            assert_eq!(core.state().pages_used, 0);
        });
    }
}

/// Even tokens only.
struct Even(Vec<u32>);

impl Constraint for Even {
    fn mask(&mut self, logits: &mut [f32]) -> Result<()> {
        logits.iter_mut().skip(1).step_by(2).for_each(|logit| *logit = f32::MIN);
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<()> {
        assert!(token.is_multiple_of(2), "{token} was not let");
        self.0.push(token);
        if self.0.len() == 9 { Err(evenkeel::Error::input("nine are enough")) } else { Ok(()) }
    }
}

#[test]
fn what_a_constraint_lets_comes() {
    let engine = model("parity/llama", 3, None).engine(&EngineOptions::default()).unwrap();
    let sampling = Sampling { temperature: 1.5, repetition_penalty: 1.2, ..Sampling::greedy() };
    for (sampling, most, fails) in
        [(Sampling::greedy(), 8, false), (sampling, 8, false), (Sampling::greedy(), 30, true)]
    {
        let (sender, events) = mpsc::channel();
        let options = GenerateOptions { sampling, max_new_tokens: Some(most), ignore_eos: true, ..Default::default() };
        let request =
            Request { prompt: vec![5, 6, 7], options, logprobs: Some(3), constraint: Some(Box::new(Even(Vec::new()))) };
        engine.submit(request, move |event| sender.send(event).unwrap()).unwrap();
        let events: Vec<Event> = events.iter().collect();
        let pieces = events.iter().filter_map(|event| if let Event::Piece(piece) = event { Some(piece) } else { None });
        let logprobs: Vec<_> = pieces.filter_map(|piece| piece.logprobs.clone()).collect();
        assert_eq!(logprobs.len(), 8);
        for told in &logprobs {
            assert!(told.top.len() == 3 && told.logprob <= told.top[0].1 && told.top[0].1 < 0.0, "{told:?}");
        }
        match events.last().unwrap() {
            Event::Failed(error) => assert!(fails && error.to_string() == "nine are enough", "{error}"),
            Event::Done(report) => assert_eq!((report.generated_tokens, fails), (8, false)),
            Event::Piece(_) => panic!("it does not end"),
        }
    }
    engine.close();
    engine.wait().unwrap();
    assert_eq!(engine.state().pages_used, 0);
}

#[test]
fn threads_get_each_its_own_answer() {
    let mut model = model("parity/llama", 4, None);
    let texts = texts(&model, 16, 100);
    let wanted: Vec<_> = texts.iter().map(|text| alone(&mut model, text)).collect();
    let engine = model.engine(&EngineOptions::default()).unwrap();
    std::thread::scope(|scope| {
        for (at, ((prompt, most, sampling), wanted)) in texts.iter().zip(&wanted).enumerate() {
            let engine = engine.clone();
            scope.spawn(move || {
                let (sender, events) = mpsc::channel();
                let cancel = Cancel::new();
                let options = GenerateOptions {
                    sampling: sampling.clone(),
                    max_new_tokens: Some(*most),
                    ignore_eos: true,
                    cancel: cancel.clone(),
                    ..Default::default()
                };
                let request = Request { prompt: prompt.clone(), options, ..Request::default() };
                engine.submit(request, move |event| drop(sender.send(event))).unwrap();
                let mut tokens = Vec::new();
                for event in events {
                    match event {
                        Event::Piece(piece) => tokens.extend(piece.token),
                        Event::Done(report) => {
                            let finish = if at % 4 == 3 { Finish::Interrupted } else { Finish::MaxNewTokens };
                            assert!(report.finish == finish || tokens == *wanted, "{report:?}");
                        }
                        Event::Failed(error) => panic!("{error}"),
                    }
                    if at % 4 == 3 && tokens.len() > 2 {
                        cancel.cancel();
                    }
                }
                assert!(wanted.starts_with(&tokens) && !tokens.is_empty());
                assert!(at % 4 == 3 || tokens.len() == wanted.len());
            });
        }
    });
    // An answer that is dropped ends.
    let mut answer = engine.generate("t1 t2 t3", Sampling::greedy()).unwrap();
    assert!(answer.next().unwrap().is_ok());
    drop(answer);
    engine.close();
    engine.wait().unwrap();
    assert_eq!((engine.state().pages_used, engine.state().running), (0, 0));
    assert!(engine.generate("t1", Sampling::greedy()).is_err(), "it is closed");
}

#[test]
fn what_cannot_be_answered_is_refused() {
    let engine = model("parity/llama", 1, None).engine(&EngineOptions { max_waiting: 2 }).unwrap();
    let submit = |prompt: Vec<u32>, most, sampling| {
        let options = GenerateOptions { sampling, max_new_tokens: Some(most), ignore_eos: true, ..Default::default() };
        engine.submit(Request { prompt, options, ..Request::default() }, |_| ())
    };
    for (prompt, most, temperature, what) in [
        (vec![], 1, 0.0, "empty"),
        (vec![1; 300], 1, 0.0, "300"),
        (vec![1; 200], 57, 0.0, "256"),
        (vec![1], usize::MAX, 0.0, "256"),
        (vec![1], 1, -1.0, "temperature"),
    ] {
        let error = submit(prompt, most, Sampling { temperature, ..Sampling::greedy() }).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    }
    let refused: Vec<_> = (0..40).filter_map(|_| submit(vec![1; 9], 200, Sampling::greedy()).err()).collect();
    assert!(refused.len() > 30 && refused.iter().all(|error| error.kind() == ErrorKind::Busy));
    // What is no token of the model is told to whoever asked.
    let other = model("parity/llama", 1, None).engine(&EngineOptions::default()).unwrap();
    let (sender, events) = mpsc::channel();
    let request = Request { prompt: vec![1 << 30], ..Request::default() };
    other.submit(request, move |event| sender.send(event).unwrap()).unwrap();
    assert!(matches!(events.recv().unwrap(), Event::Failed(error) if error.to_string().contains("is not among")));
}

#[test]
fn room_for_keys_and_values_is_held_against_the_context() {
    let checkpoint = Checkpoint::open(fixture("parity/llama")).unwrap();
    let plan = |kv_memory: u64| {
        let options = PlanOptions { batch: Some(4), kv_memory: Some(Bytes(kv_memory)), ..PlanOptions::default() };
        Plan::new(&checkpoint, &roomy(), options)
    };
    let whole = plan(u64::MAX).unwrap();
    let bytes: u64 = whole.modules.iter().map(|module| module.kv_cache.0).sum();
    assert_eq!(whole.pages, 4 * 4);
    assert_eq!(plan(bytes).unwrap().pages, 16);
    assert_eq!(plan(bytes - 1).unwrap().pages, 15);
    assert_eq!(plan(bytes / 4).unwrap().pages, 4);
    let error = plan(bytes / 4 - 1).unwrap_err();
    assert!(error.to_string().contains("a context of 256 tokens"), "{error}");
    let map = plan(bytes / 2).unwrap().device_map();
    let options = PlanOptions {
        device_map: Some(evenkeel::DeviceMap::parse("map", map.into_bytes()).unwrap()),
        ..PlanOptions::default()
    };
    assert_eq!(Plan::new(&checkpoint, &roomy(), options).unwrap().pages, 8);
}
