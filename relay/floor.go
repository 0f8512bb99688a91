package relay

import (
	"cmp"
	"context"
	"errors"
	"math"
	"slices"
	"time"
)

// The floor is the id up to which every id has been found by a read, or is in a gap.

// errGoneBack says that ids will be issued again that were seen.
var errGoneBack = errors.New("the sequence has gone back: another server answers, or it was restored")

// look says whether there may be something above the floor. While nothing has come for
// a while it asks, at a fraction of the cost of a page, whether an id was drawn. Now and
// then a page is read all the same: ids need not come from the sequence.
func (r *reader) look(ctx context.Context) (drawn bool, err error) {
	if !r.idling || len(r.gaps.groups) > 0 {
		r.noParked = false // for all that is known without asking
		return true, nil
	}
	if time.Since(r.readAt) >= dueEvery {
		return true, nil
	}
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	var last int64
	var free, parked bool
	asked, ask := time.Now(), r.anyParked.due()
	if err := r.db.QueryRow(ctx, r.sql.drawn, unplanned, ask).Scan(&last, &free, &parked); err != nil {
		return false, err
	}
	if time.Since(asked) > slowLook {
		r.anyParked.ran(asked)
	}
	if free {
		notify(r.leases.look)
	}
	r.noParked = !parked
	return last != r.floor, nil
}

// readNew reads what is above the floor or in a gap.
func (r *reader) readNew(ctx context.Context, ours []int16) (added int, err error) {
	if len(r.late) > 0 {
		return r.readLate(ctx, ours)
	}
	r.readAt = time.Now()
	spans := r.gaps.fresh()
	many := len(first(spans)) < len(spans)
	if many {
		spans = nil
	}
	p, err := r.readSpans(ctx, append(spans, span{r.floor + 1, math.MaxInt64}), ours)
	if err == nil && p.drawn < r.floor {
		err = errGoneBack
	}
	if err != nil {
		return 0, err
	}
	if many || len(r.gaps.ended(p.running)) > 0 {
		// What was committed into these gaps comes before this page.
		r.beginLate(p.running)
		if added, err = r.readLate(ctx, ours); err != nil || len(r.late) > 0 {
			return added, err // the rest of them first
		}
	} else if !p.cut || p.ids[len(p.ids)-1] > r.floor { // the page got through all gaps
		r.gaps.looked(p.running, r.readAt)
	}
	added += r.hand.admit(p.messages)
	r.gaps.fill(p.ids)
	r.raise(p)
	if p.cut {
		added = max(added, 1)
	}
	return added, nil
}

// So many gaps are looked into at once, and not many more rows: a page at most of each.
const (
	lateSpans = 1000
	lateRows  = 10 * pageRows
)

// readLate reads what is in the gaps that may have been filled, in the order of ids,
// until that is done or the hand is full. A long transaction can leave tens of thousands
// of gaps, or large ones.
func (r *reader) readLate(ctx context.Context, ours []int16) (added int, err error) {
	for len(r.late) > 0 && !r.hand.full() {
		spans := first(r.late)
		began := time.Now()
		p, err := r.readSpans(ctx, spans, ours)
		if err != nil {
			return added, err
		}
		if r.gaps.endings(p.running) > r.gaps.endings(r.lateSeen) {
			// What ended since may have filled other gaps too, with what comes first.
			r.readAt = began
			r.beginLate(p.running)
			continue
		}
		added += r.hand.admit(p.messages)
		r.gaps.fill(p.ids)
		last := spans[len(spans)-1].high
		if p.cut {
			last = p.ids[len(p.ids)-1]
		}
		for len(r.late) > 0 && r.late[0].high <= last {
			r.late = r.late[1:]
		}
		if len(r.late) > 0 {
			r.late[0].low = max(r.late[0].low, last+1)
		}
	}
	if len(r.late) == 0 {
		r.gaps.looked(r.lateSeen, r.readAt)
	}
	return max(added, 1), nil
}

// beginLate notes the gaps into which a read with snapshot s, or a later one, must look.
func (r *reader) beginLate(s snapshot) {
	r.late, r.lateSeen = append(r.gaps.ended(s), r.gaps.fresh()...), s
	slices.SortFunc(r.late, func(a, b span) int { return cmp.Compare(a.low, b.low) })
}

// first returns those of spans that are looked into at once.
func first(spans []span) []span {
	rows := int64(0)
	for n, s := range spans {
		if n == lateSpans || rows > lateRows {
			return spans[:n]
		}
		rows += min(s.high-s.low+1, pageRows)
	}
	return spans
}

// raise moves the floor to the last id that a read has found; if there was none
// above it, to the last that was drawn, lest each read pass over the same dead
// rows. It never moves beyond that one: of ids that did not come from the sequence
// those below are still to come.
func (r *reader) raise(p page) {
	var above []int64
	for _, id := range p.ids {
		if id > r.floor && id <= p.drawn {
			above = append(above, id)
		}
	}
	to := p.drawn
	if p.cut && len(above) == 0 {
		return
	}
	if p.cut || len(above) > 0 {
		to = above[len(above)-1]
	}
	if to > r.floor {
		r.gaps.add(between(span{r.floor + 1, to}, above), time.Now())
		r.floor = to
	}
}
