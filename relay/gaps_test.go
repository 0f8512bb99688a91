package relay

import (
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// What is left of spans after some ids were found is what a set of ids would say.
func TestGapsLoseOnlyWhatWasFound(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		gap := make(map[int64]bool)
		for _, id := range rapid.SliceOf(rapid.Int64Range(1, 60)).Draw(t, "gaps") {
			gap[id] = true
		}
		found := rapid.SliceOfDistinct(rapid.Int64Range(1, 60), rapid.ID[int64]).Draw(t, "found")
		slices.Sort(found)
		var taken []int64
		for id := int64(1); id <= 60; id++ {
			if !gap[id] {
				taken = append(taken, id)
			}
		}
		g := gaps{}
		g.add(between(span{1, 60}, taken), time.Now())
		g.fill(found)
		left := make(map[int64]bool)
		for _, s := range g.fresh() {
			for id := s.low; id <= s.high; id++ {
				left[id] = true
			}
		}
		for id := int64(1); id <= 60; id++ {
			if want := gap[id] && !slices.Contains(found, id); left[id] != want {
				t.Fatalf("id %d: left %t, want %t", id, left[id], want)
			}
		}
	})
}

// A read that went up to some id settles the gaps up to it, and leaves those above as
// they were.
func TestGapsAreSettledUpToWhereTheReadWent(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var spans []span
		for id := int64(0); len(spans) < 8; {
			low := id + rapid.Int64Range(1, 5).Draw(t, "found")
			id = low + rapid.Int64Range(0, 5).Draw(t, "length")
			spans = append(spans, span{low, id})
		}
		at := rapid.Int64Range(0, 100).Draw(t, "up to")
		var settled, left []int64
		for _, s := range spans {
			for id := s.low; id <= s.high; id++ {
				if id <= at {
					settled = append(settled, id)
				} else {
					left = append(left, id)
				}
			}
		}
		ids := func(spans []span) (all []int64) {
			for _, s := range spans {
				for id := s.low; id <= s.high; id++ {
					all = append(all, id)
				}
			}
			return all
		}
		now := time.Now()
		g := gaps{}
		g.add(spans, now)
		s := snapshot{listed: []uint64{100}, xmax: 105, next: 105}
		g.readUpTo(s, now.Add(gapMoment), at)
		if got := ids(g.fresh()); !slices.Equal(got, left) {
			t.Errorf("fresh: %v, want %v", got, left)
		}
		if got := ids(g.ended(snapshot{xmax: 105, next: 105})); !slices.Equal(got, settled) {
			t.Errorf("settled: %v, want %v", got, settled)
		}
	})
}

// A gap is looked into at every read while it is fresh, then when a transaction
// that ran at the time has ended, and never again once all have.
func TestGapIsLookedIntoOnlyWhileItCanBeFilled(t *testing.T) {
	t.Parallel()
	now := time.Now()
	at := func(xids ...uint64) snapshot { return snapshot{listed: xids, xmax: 105, next: 105} }
	g := gaps{}
	g.add([]span{{5, 9}}, now)
	g.readUpTo(at(100, 101), now.Add(gapMoment/2), all)
	if len(g.fresh()) != 1 {
		t.Fatal("forgotten while a transaction may have drawn an id and has no number yet")
	}
	g.readUpTo(at(100, 102), now.Add(gapMoment), all) // 101 has ended, 102 came
	if len(g.fresh()) != 0 || len(g.ended(at(100, 102, 103))) != 0 {
		t.Error("looked into while nothing can have changed")
	}
	if len(g.ended(at(100, 103))) != 1 {
		t.Error("not looked into after 102 has ended")
	}
	g.readUpTo(at(100, 103), now.Add(2*gapMoment), all)
	if len(g.ended(at(100))) != 0 || len(g.ended(at(104))) != 1 {
		t.Error("waits for another transaction than 100")
	}
	g.readUpTo(at(104), now.Add(3*gapMoment), all)
	if len(g.groups) != 0 {
		t.Errorf("remembered after all have ended: %v", g.groups)
	}
}

// Whatever a snapshot lists and leaves out, the transactions that may fill a gap are
// those that were in progress, and still are.
func TestSnapshotsTellWhoIsStillInProgress(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		inProgress, next, highest := make(map[uint64]bool), uint64(3), uint64(2)
		var former snapshot // restricted to what was in progress at its time
		fillers := make(map[uint64]bool)
		for step := range rapid.IntRange(1, 40).Draw(t, "steps") {
			if rapid.Bool().Draw(t, "begins") {
				inProgress[next] = true
				next++
			}
			for xid := range next {
				if inProgress[xid] && rapid.IntRange(0, 3).Draw(t, "ends") == 0 {
					delete(inProgress, xid)
					delete(fillers, xid)
					highest = max(highest, xid)
				}
			}
			s := snapshot{xmax: highest + 1, next: next}
			for xid := uint64(3); xid <= highest; xid++ {
				if inProgress[xid] {
					s.listed = append(s.listed, xid)
				}
			}
			if step == 0 {
				former, fillers = s, maps.Clone(inProgress)
				continue
			}
			former = s.running(former)
			held := make(map[uint64]bool)
			for _, xid := range former.listed {
				held[xid] = true
			}
			for xid := former.xmax; xid < former.next; xid++ {
				held[xid] = true
			}
			if !maps.Equal(held, fillers) || former.size() != len(fillers) {
				t.Fatalf("in progress %v, not %v", held, fillers)
			}
		}
	})
}
