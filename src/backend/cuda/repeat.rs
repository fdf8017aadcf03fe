//! Launches that come again and again.

use super::driver::Gpu;
use super::kernels::Graph;
use crate::error::Result;

/// Launches that come again and again, the same ones for the same key.
#[derive(Default)]
pub(super) enum Repeated<K> {
    /// They have not run yet.
    #[default]
    New,
    Launched(K),
    Kept(K, Graph),
    /// They are not to be kept, or cannot be: why.
    Apart(Option<String>),
}

impl<K: PartialEq> Repeated<K> {
    /// Queues what `launch` does, in one call where it is kept: from the second time on. `launch` waits for nothing.
    pub fn queue(&mut self, gpu: &Gpu, key: K, launch: impl Fn(&K) -> Result<()>) -> Result<()> {
        match self {
            Self::Kept(kept, graph) if *kept == key => return gpu.replay(graph),
            Self::Launched(launched) if *launched == key => match gpu.capture(|| launch(&key)) {
                Ok(graph) => {
                    gpu.replay(&graph)?;
                    *self = Self::Kept(key, graph);
                    return Ok(());
                }
                Err(error) => *self = Self::Apart(Some(error.to_string())),
            },
            // A graph that is of no more use gives its memory back before another takes some.
            Self::New | Self::Launched(_) | Self::Kept(..) => {
                *self = Self::New;
                launch(&key)?;
                *self = Self::Launched(key);
                return Ok(());
            }
            Self::Apart(_) => {}
        }
        launch(&key)
    }

    /// Why they are launched one by one.
    pub fn why_apart(&self) -> Option<&str> {
        if let Self::Apart(why) = self { why.as_deref() } else { None }
    }
}
