package relay

import (
	"cmp"
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
	spans   []span // sorted
	since   time.Time
	settled bool     // it is known who may fill them
	fillers snapshot // those, if settled, that still ran at the last look
}

// span is the ids from low to high, both included.
type span struct{ low, high int64 }

// snapshot is the transactions in progress when a statement began; what they write it
// cannot see. pg_current_snapshot() lists them only below the highest number that had
// ended then, its xmax: from there on all that had a number were in progress.
type snapshot struct {
	listed []uint64 // sorted
	xmax   uint64   // above those
	next   uint64   // above all that had a number
}

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
		if group.settled && s.running(group.fillers).size() < group.fillers.size() {
			all = append(all, group.spans...)
		}
	}
	return all
}

// readUpTo records that a read with snapshot s, which began then, has looked into what
// fresh and ended returned, up to the id upTo. Gaps that nobody can fill any more are
// forgotten.
func (g *gaps) readUpTo(s snapshot, began time.Time, upTo int64) {
	var kept []gapGroup
	keep := func(group gapGroup) {
		if group.settled && group.fillers.size() == 0 || len(group.spans) == 0 {
			return
		}
		same := slices.IndexFunc(kept, func(k gapGroup) bool {
			return group.settled && k.settled && k.fillers.equal(group.fillers)
		})
		if same >= 0 {
			kept[same].spans = merge(kept[same].spans, group.spans)
		} else {
			kept = append(kept, group)
		}
	}
	for _, group := range g.groups {
		rest := group
		group.spans, rest.spans = split(group.spans, upTo)
		switch {
		case group.settled:
			group.fillers = s.running(group.fillers)
		case began.Sub(group.since) >= gapMoment:
			group.settled, group.fillers = true, s
		}
		keep(group)
		keep(rest)
	}
	g.groups = kept
}

// fill removes ids that a read has found; they are sorted.
func (g *gaps) fill(ids []int64) {
	for i := range g.groups {
		g.groups[i].spans = without(g.groups[i].spans, ids)
	}
}

// hold says whether an id is in a gap.
func (g *gaps) hold(id int64) bool {
	return slices.ContainsFunc(g.groups, func(group gapGroup) bool {
		_, found := slices.BinarySearchFunc(group.spans, id, func(s span, id int64) int {
			switch {
			case s.high < id:
				return -1
			case s.low > id:
				return 1
			}
			return 0
		})
		return found
	})
}

// without returns what is left of spans after ids were found; both are sorted.
func without(spans []span, ids []int64) []span {
	if len(ids) == 0 {
		return spans
	}
	begin, _ := slices.BinarySearchFunc(spans, ids[0], func(s span, id int64) int { return cmp.Compare(s.high, id) })
	end, _ := slices.BinarySearchFunc(spans, ids[len(ids)-1]+1, func(s span, id int64) int { return cmp.Compare(s.low, id) })
	if begin >= end {
		return spans
	}
	var left []span
	for _, s := range spans[begin:end] {
		i, _ := slices.BinarySearch(ids, s.low)
		found := ids[i:]
		upTo, _ := slices.BinarySearch(found, s.high+1)
		left = append(left, between(s, found[:upTo])...)
	}
	return slices.Replace(spans, begin, end, left...)
}

// split returns the parts of spans up to an id and above it. It uses their memory.
func split(spans []span, at int64) (upTo, above []span) {
	n, _ := slices.BinarySearchFunc(spans, at, func(s span, at int64) int {
		if s.high <= at {
			return -1
		}
		return 1
	})
	upTo, above = spans[:n:n], spans[n:]
	if len(above) > 0 && above[0].low <= at {
		upTo = append(upTo, span{above[0].low, at})
		above[0].low = at + 1
	}
	return upTo, above
}

// merge returns all of two lists of spans, sorted.
func merge(a, b []span) []span {
	all := append(a, b...)
	if len(a) > 0 && len(b) > 0 && a[len(a)-1].low > b[0].low {
		slices.SortFunc(all, func(a, b span) int { return cmp.Compare(a.low, b.low) })
	}
	return all
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

// running returns those of the transactions in earlier that are in progress in s, too.
func (s snapshot) running(earlier snapshot) snapshot {
	var in []uint64
	for _, xid := range earlier.listed {
		if _, ok := slices.BinarySearch(s.listed, xid); ok {
			in = append(in, xid)
		}
	}
	for _, xid := range s.listed {
		if earlier.xmax <= xid && xid < earlier.next {
			in = append(in, xid)
		}
	}
	return snapshot{in, min(max(s.xmax, earlier.xmax), earlier.next), earlier.next}
}

// size is how many transactions s holds.
func (s snapshot) size() int { return len(s.listed) + int(s.next-s.xmax) }

func (s snapshot) equal(other snapshot) bool {
	return s.size() == other.size() && slices.Equal(s.listed, other.listed) && (s.xmax == s.next || s.next == other.next)
}
