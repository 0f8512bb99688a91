package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
)

// Result is one measured metric, in the form of the JSON that -out writes.
type Result struct {
	Scenario string             `json:"scenario"`
	Metric   string             `json:"metric"`
	Value    float64            `json:"value"`
	Unit     string             `json:"unit"`
	Limit    float64            `json:"limit"`  // what Value is held against; 0: nothing, the target is absolute
	Ratio    *float64           `json:"ratio"`  // the median of the rounds' ratios; null where the target is absolute
	Target   float64            `json:"target"` // for Ratio, or for Value
	Met      bool               `json:"met"`
	Peers    map[string]float64 `json:"peers"`
	Rounds   []Round            `json:"rounds"`
	Settings map[string]string  `json:"settings"`
}

// Round is ours and the limit, measured one after the other.
type Round struct {
	Value float64 `json:"value"`
	Limit float64 `json:"limit"`
	Ratio float64 `json:"ratio"`
}

// sideBySide is the result of rounds in which ours and the limit took turns; the
// target is the least ratio.
func sideBySide(metric, unit string, target float64, rounds []Round) Result {
	ratio := median(rounds, func(r Round) float64 { return r.Ratio })
	return Result{
		Metric: metric, Unit: unit, Target: target, Rounds: rounds, Ratio: &ratio, Met: ratio >= target,
		Value: median(rounds, func(r Round) float64 { return r.Value }),
		Limit: median(rounds, func(r Round) float64 { return r.Limit }),
	}
}

// atMost is the result of a single measurement that must not exceed the target.
func atMost(metric, unit string, target, value float64) Result {
	return Result{
		Metric: metric, Unit: unit, Target: target, Value: value, Met: value <= target, Rounds: []Round{{Value: value}},
	}
}

// median is the middle one, or the mean of the two in the middle.
func median(rounds []Round, of func(Round) float64) float64 {
	values := make([]float64, len(rounds))
	for i, r := range rounds {
		values[i] = of(r)
	}
	slices.Sort(values)
	n := len(values)
	if n == 0 {
		return 0
	}
	return (values[(n-1)/2] + values[n/2]) / 2
}

// print writes the table for people.
func print(w io.Writer, results []Result) {
	fmt.Fprintf(w, "%-10s %-14s %12s %12s %7s %8s  %s\n", "scenario", "metric", "value", "limit", "ratio", "target", "met")
	for _, r := range results {
		limit, ratio := "-", "-"
		if r.Ratio != nil {
			limit, ratio = number(r.Limit), fmt.Sprintf("%.2f", *r.Ratio)
		}
		met := "yes"
		if !r.Met {
			met = "NO"
		}
		fmt.Fprintf(w, "%-10s %-14s %12s %12s %7s %8s  %s\n",
			r.Scenario, r.Metric, number(r.Value)+" "+r.Unit, limit, ratio, number(r.Target), met)
		var rounds []string
		for _, round := range r.Rounds {
			if r.Ratio != nil {
				rounds = append(rounds, fmt.Sprintf("%s/%s=%.2f", number(round.Value), number(round.Limit), round.Ratio))
			}
		}
		if len(rounds) > 0 {
			fmt.Fprintf(w, "%-10s rounds: %s\n", "", strings.Join(rounds, "  "))
		}
		for _, peer := range slices.Sorted(maps.Keys(r.Peers)) {
			fmt.Fprintf(w, "%-10s beside it: %s %s\n", "", peer, number(r.Peers[peer]))
		}
	}
}

func number(v float64) string {
	if v >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

func write(file string, results []Result) error {
	data, err := json.MarshalIndent(results, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(data, '\n'), 0o644)
}
