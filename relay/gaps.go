package relay

import (
	"slices"
	"time"
)

// gaps are the ids below the floor that no read has found: rolled back, or of a
// transaction that has yet to commit. Ids are drawn in order and commit in any,
// so a read after the floor alone would skip what commits late.
//
// A gap can only be filled by a transaction that ran when the gap appeared, so
// it need not be looked at again while all of those still run, and never again
// once all have ended. An id is drawn a moment before its transaction has a
// number, so who may fill a gap is known only when that moment has passed: until
// then every read looks into it.
type gaps struct {
	groups []gapGroup
}

// gapGroup is the gaps that the same transactions may fill.
type gapGroup struct {
	spans   []span
	since   time.Time
	settled bool     // it is known who may fill them
	fillers []uint64 // those, if settled, that still ran at the last look; sorted
}

// span is the ids from low to high, both included.
type span struct{ low, high int64 }

// snapshot is what pg_current_snapshot() says of a statement: the transactions
// in progress, sorted; what they write it cannot see.
type snapshot []uint64

// gapMoment is longer than a transaction takes from drawing an id to having a
// number.
const gapMoment = time.Second

// add remembers new gaps.
func (g *gaps) add(spans []span, now time.Time) {
	if len(spans) > 0 {
		g.groups = append(g.groups, gapGroup{spans: spans, since: now})
	}
}

// fresh returns the gaps into which every read must look.
func (g *gaps) fresh() []span {
	var all []span
	for _, group := range g.groups {
		if !group.settled {
			all = append(all, group.spans...)
		}
	}
	return all
}

// ended returns the gaps that a read with that snapshot or a later one may find
// filled for the first time.
func (g *gaps) ended(s snapshot) []span {
	var all []span
	for _, group := range g.groups {
		if group.settled && len(s.running(group.fillers)) < len(group.fillers) {
			all = append(all, group.spans...)
		}
	}
	return all
}

// looked records that a read with snapshot s has looked into what fresh and ended
// returned. Gaps that nobody can fill any more are forgotten.
func (g *gaps) looked(s snapshot, now time.Time) {
	kept := g.groups[:0]
	for _, group := range g.groups {
		switch {
		case group.settled:
			group.fillers = s.running(group.fillers)
		case now.Sub(group.since) >= gapMoment:
			group.settled, group.fillers = true, slices.Clone(s)
		}
		if group.settled && len(group.fillers) == 0 || len(group.spans) == 0 {
			continue
		}
		same := slices.IndexFunc(kept, func(k gapGroup) bool {
			return group.settled && k.settled && slices.Equal(k.fillers, group.fillers)
		})
		if same >= 0 {
			kept[same].spans = append(kept[same].spans, group.spans...)
		} else {
			kept = append(kept, group)
		}
	}
	clear(g.groups[len(kept):])
	g.groups = kept
}

// fill removes ids that a read has found; they are sorted.
func (g *gaps) fill(ids []int64) {
	for i := range g.groups {
		g.groups[i].spans = without(g.groups[i].spans, ids)
	}
}

// without returns what is left of spans after ids, which are sorted, were found.
func without(spans []span, ids []int64) []span {
	touched := slices.ContainsFunc(spans, func(s span) bool {
		i, _ := slices.BinarySearch(ids, s.low)
		return i < len(ids) && ids[i] <= s.high
	})
	if !touched {
		return spans
	}
	var left []span
	for _, s := range spans {
		i, _ := slices.BinarySearch(ids, s.low)
		found := ids[i:]
		end, _ := slices.BinarySearch(found, s.high+1)
		left = append(left, between(s, found[:end])...)
	}
	return left
}

// between returns the parts of s between the ids found in it, which are sorted.
func between(s span, found []int64) []span {
	var parts []span
	low := s.low
	for _, id := range found {
		if low < id {
			parts = append(parts, span{low, id - 1})
		}
		low = id + 1
	}
	if low <= s.high {
		parts = append(parts, span{low, s.high})
	}
	return parts
}

// running returns those of xids that are in progress in s.
func (s snapshot) running(xids []uint64) []uint64 {
	var in []uint64
	for _, xid := range xids {
		if _, ok := slices.BinarySearch(s, xid); ok {
			in = append(in, xid)
		}
	}
	return in
}
