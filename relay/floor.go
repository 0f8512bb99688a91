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

// anyNew says whether there may be something above the floor. While nothing has come for
// a while it asks, at a fraction of the cost of a page, whether an id was drawn. Now and
// then a page is read all the same: ids need not come from the sequence.
func (r *reader) anyNew(ctx context.Context) (drawn bool, err error) {
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
		notify(r.leases.wake)
	}
	r.noParked = !parked
	return last != r.floor, nil
}

// readNew reads what is above the floor or in a gap.
func (r *reader) readNew(ctx context.Context, ours []int16) (more bool, err error) {
	if drawn, err := r.anyNew(ctx); err != nil || !drawn || r.scan.urgent {
		return false, err
	}
	r.readAt = time.Now()
	p, err := r.readPage(ctx, ours)
	if err != nil {
		return false, err
	}
	r.gaps.readUpTo(p.running, r.readAt, p.upTo)
	added := r.hand.admit(p.messages)
	r.gaps.fill(p.ids)
	r.raise(p)
	return added > 0 || p.cut(), nil
}

// readPage reads, in one snapshot, what is above the floor, in a fresh gap, or in one
// that may have been filled by then.
func (r *reader) readPage(ctx context.Context, ours []int16) (p page, err error) {
	fresh := r.gaps.fresh()
	many := len(first(fresh)) < len(fresh)
	late := func(s snapshot) []span { // what the page itself does not bring
		spans := r.gaps.ended(s)
		if many {
			spans = append(spans, fresh...)
		}
		slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.low, b.low) })
		return spans
	}
	read := func(ctx context.Context, db querier) (page, error) {
		spans := []span{{r.floor + 1, math.MaxInt64}}
		if !many {
			spans = slices.Concat(fresh, spans)
		}
		p, err := r.readSpans(ctx, db, spans, ours)
		if err == nil && p.drawn < r.floor {
			err = errGoneBack
		}
		return p, err
	}
	if !r.loaded && len(fresh) == 0 { // one round trip does, mostly
		quick, cancel := context.WithTimeout(ctx, r.limit())
		defer cancel()
		p, err = read(quick, r.db)
		if err != nil || (p.durable || len(p.ids) == 0) && len(late(p.running)) == 0 {
			return p, err
		}
	}
	return r.durably(ctx, func(ctx context.Context, db querier) (page, error) {
		p, err := read(ctx, db)
		if err == nil {
			err = r.readLate(ctx, db, ours, &p, late(p.running))
		}
		return p, err
	})
}

const (
	// So many gaps are looked into at once, and not many more rows: a page at most of each.
	lateSpans = 1000
	lateRows  = 10 * pageRows
	// lateFor is how long a snapshot is kept for it. A million gaps take less.
	lateFor = 3 * time.Second
)

// readLate adds to a page what is in spans, in the order of ids, until a page is full. A
// long transaction can leave tens of thousands of gaps, or large ones.
func (r *reader) readLate(ctx context.Context, db querier, ours []int16, p *page, spans []span) error {
	if len(spans) == 0 {
		return nil
	}
	began, rows, bytes, upTo := time.Now(), 0, 0, int64(0)
	for len(spans) > 0 && rows < pageRows && bytes < pageBytes && time.Since(began) < lateFor {
		now := first(spans)
		found, err := r.readSpans(ctx, db, now, ours)
		if err != nil {
			return err
		}
		p.messages, p.ids = append(p.messages, found.messages...), append(p.ids, found.ids...)
		rows += len(found.ids)
		for _, m := range found.messages {
			bytes += len(m.payload)
		}
		upTo = min(found.upTo, now[len(now)-1].high)
		_, spans = split(spans, upTo)
	}
	p.sort()
	if len(spans) == 0 {
		upTo = all
	}
	if upTo = min(upTo, p.upTo); upTo != all {
		p.cutAt(upTo)
	}
	return nil
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
	if p.cut() && len(above) == 0 {
		return
	}
	if p.cut() || len(above) > 0 {
		to = above[len(above)-1]
	}
	if to > r.floor {
		r.gaps.add(between(span{r.floor + 1, to}, above), time.Now())
		r.floor = to
	}
}
