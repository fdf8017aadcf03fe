//! Launches that come again and again.

use super::driver::Gpu;
use super::kernels::Graph;
use crate::error::Result;

/// Launches that come again and again, the same ones for the same key.
#[derive(Default)]
pub(super) enum Repeated<K> {
    /// They have not run yet; the driver loads kernels at their first launch.
    #[default]
    New,
    Launched,
    Kept(K, Graph),
    /// They cannot be kept.
    Apart,
}

impl<K: PartialEq> Repeated<K> {
    /// Queues what `launch` does, in one call where it is kept. `launch` waits for nothing.
    pub fn queue(&mut self, gpu: &Gpu, key: K, launch: impl Fn() -> Result<()>) -> Result<()> {
        match self {
            Self::Kept(kept, graph) if *kept == key => gpu.replay(graph)?,
            Self::Apart => launch()?,
            Self::New => {
                launch()?;
                *self = Self::Launched;
            }
            Self::Launched | Self::Kept(..) => {
                if let Some(graph) = gpu.capture(&launch) {
                    gpu.replay(&graph)?;
                    *self = Self::Kept(key, graph);
                } else {
                    launch()?;
                    *self = Self::Apart;
                }
            }
        }
        Ok(())
    }
}
