//! A line chart as inline SVG: no script, no font, no network. Knows only points.

use maud::{Markup, html};

/// One line of a chart.
pub(crate) struct Series {
    /// What it shows, for the legend.
    pub(crate) label: String,
    /// (x, y) in data units, x ascending; values that are not finite are left out.
    pub(crate) points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 48.0;
const BOTTOM: f64 = 28.0;
const TOP: f64 = 22.0;
const RIGHT: f64 = 12.0;
/// Up to this many points a series also gets dots.
const DOTS_MAX: usize = 40;

/// Draws up to two series over common axes; the y axis starts at zero.
pub(crate) fn lines(series: &[Series], x_label: &str, y_label: &str) -> Markup {
    let finite: Vec<Vec<(f64, f64)>> = series
        .iter()
        .map(|one| one.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect())
        .collect();
    let all = || finite.iter().flatten();
    let (x_low, x_high) = range(all().map(|point| point.0));
    let (_, y_high) = range(all().map(|point| point.1).chain([0.0]));
    let y_high = y_high.max(1e-9) * 1.05;
    let x_span = (x_high - x_low).max(1e-9);
    let x = |value: f64| LEFT + (value - x_low) / x_span * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| HEIGHT - BOTTOM - value / y_high * (HEIGHT - BOTTOM - TOP);
    html! {
        svg viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img" aria-label={ (y_label) " over " (x_label) } {
            @for tick in 0..=4 {
                @let value = y_high * f64::from(tick) / 4.0;
                line .axis x1=(LEFT) x2=(WIDTH - RIGHT) y1=(number(y(value))) y2=(number(y(value))) {}
                text x=(LEFT - 6.0) y=(number(y(value) + 4.0)) text-anchor="end" { (format!("{value:.2}")) }
            }
            text x=(LEFT) y=(HEIGHT - 8.0) { (format!("{x_low:.0}")) }
            text x=(WIDTH - RIGHT) y=(HEIGHT - 8.0) text-anchor="end" { (format!("{x_high:.0} {x_label}")) }
            @for (index, (one, points)) in series.iter().zip(&finite).enumerate() {
                polyline class={ "series-" (index) } stroke-width="1.8"
                    points=(points.iter().map(|point| format!("{},{}", number(x(point.0)), number(y(point.1)))).collect::<Vec<_>>().join(" ")) {}
                @if points.len() <= DOTS_MAX {
                    @for point in points { circle class={ "dot-" (index) } cx=(number(x(point.0))) cy=(number(y(point.1))) r="2.6" {} }
                }
                @let at = LEFT + 150.0 * index as f64;
                rect class={ "dot-" (index) } x=(at) y="4" width="12" height="4" {}
                text x=(at + 18.0) y="10" { (one.label) }
            }
        }
    }
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if low > high { (0.0, 1.0) } else { (low, high) }
}

fn number(value: f64) -> String {
    format!("{value:.1}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_are_not_finite_are_left_out() {
        let series =
            Series { label: "loss".to_owned(), points: vec![(1.0, 2.0), (2.0, f64::NAN), (3.0, 1.0)] };
        let svg = lines(&[series], "step", "loss").into_string();
        assert!(!svg.contains("NaN"), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 2);
    }

    #[test]
    fn an_empty_chart_is_still_a_chart() {
        assert!(lines(&[], "step", "loss").into_string().starts_with("<svg"));
    }
}
