//! Text generation. To be completed.

mod sampling;
