package relay

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// reader brings messages from the tables into the hand.
//
// Every id up to the floor has been found by a read, or is in a gap. Each read
// looks in one snapshot at all that is above the floor or in a gap and may be
// there by now. So a message is never read before another of its key that was
// committed before it was written.
type reader struct {
	db       *pgxpool.Pool
	sql      statements
	hand     *hand
	leases   *leases
	suspects *suspects
	wake     chan struct{}
	idle     time.Duration // longest wait between two looks
	health   *condition

	epochs [lanes]int64 // of the lanes that are read
	floor  int64
	gaps   gaps
	scan   scan
	readAt time.Time // when a read of what is above the floor last began
	loaded bool      // the last round found something
	idling bool      // nothing has come for a while
	slow   int       // reads in a row that took too long

	recall   []recalled // suspects no more: what was parked for them is read before its time
	recallAt time.Time  // when nothing was found for the first of them
	dueAt    time.Time  // when nothing was due
	walked   string     // the last key of which the parked messages were looked at
	walkedAt time.Time  // when
	noParked bool       // nothing was parked when last asked

	// Looks that have to pass over rows of outbox_parked that are dead and that
	// somebody's snapshot keeps. Until each may be repeated:
	allDue    pace // only what became due lately is looked for
	anyParked pace // something is taken to be parked
	anyKey    pace // each key of a page is looked up, not whether any is parked
	walking   pace // operators' changes to parked messages go unseen
}

const (
	dueEvery    = 500 * time.Millisecond
	recallFor   = 15 * time.Second // at most, if something is refused all the time
	recallEvery = 100 * time.Millisecond
	duePerLane  = 50
	readTimeout = 10 * time.Second
	flushWait   = 5 * time.Millisecond
	slowLook    = 100 * time.Millisecond // such a look passes over dead rows
	dueLately   = time.Minute
)

// run reads until ctx ends: at once again while there is something new, then
// at growing intervals up to idle.
func (r *reader) run(ctx context.Context) {
	wait := time.Duration(0)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
			r.idling = wait == r.idle
		case <-r.wake:
			wait, r.idling = 0, false
		case <-r.leases.changed:
		}
		more, err := r.once(ctx)
		if ctx.Err() != nil {
			return
		}
		r.health.set(err)
		switch {
		case err != nil:
			wait = min(max(2*wait, r.idle), time.Second)
		case r.hand.full():
			wait = r.idle
			select { // settling makes space
			case <-r.hand.space:
			case <-time.After(wait):
			case <-ctx.Done():
				return
			}
			wait = 0
		case more:
			wait = 0
		default:
			wait = min(max(2*wait, time.Millisecond), r.idle)
		}
		timer.Reset(wait)
	}
}

// limit is how long a read may take. One that took too long is given more time: from
// the start it may have to pass over millions of dead rows that a snapshot keeps.
func (r *reader) limit() time.Duration { return readTimeout << min(r.slow, 5) }

// once does one round of reading and says whether there may be more. After an
// error nothing is known any more of what was there: another server may answer
// from now on, which issues ids again that were seen. Not so if a statement was
// cancelled, by statement_timeout or by hand: the session goes on.
func (r *reader) once(ctx context.Context) (more bool, err error) {
	defer r.hand.readEnded()
	ours := r.lanes()
	r.hand.readEnded() // of a lane that is ours again, what came to nothing is read again
	if len(ours) == 0 || r.hand.full() {
		return false, nil
	}
	more, err = r.readAll(ctx, ours)
	switch {
	case err == nil:
		r.slow = 0
	case hasCode(err, "57014"): // cancelled
	default:
		if errors.Is(err, context.DeadlineExceeded) {
			r.slow++
		}
		r.floor, r.gaps, r.scan = 0, gaps{}, scan{}
		r.hand.startOver(func(int16) bool { return true })
	}
	r.loaded = more
	return more, err
}

// readAll takes the steps of a round. Each says whether there may be more.
func (r *reader) readAll(ctx context.Context, ours []int16) (more bool, err error) {
	for _, step := range []struct {
		what string
		read func(context.Context, []int16) (bool, error)
	}{
		{"outbox", r.readNew}, // what is above the floor, or in a gap
		{"outbox again", r.readOld},
		{"what was passed over", r.readPassedOver},
		{"outbox_parked", r.readRecalled},
		{"outbox_parked", r.readDue},
		{"outbox_parked", r.readBlocked}, // of keys the head of which may go
	} {
		found, err := step.read(ctx, ours)
		more = more || found
		if err != nil {
			return more, fmt.Errorf("read %s: %w", step.what, err)
		}
	}
	return more, nil
}

// readPassedOver reads what was passed over of keys that have room again.
func (r *reader) readPassedOver(ctx context.Context, ours []int16) (more bool, err error) {
	lines, from := r.hand.passedOver()
	if len(lines) == 0 {
		return false, nil
	}
	keys := make([]string, len(lines))
	for i, l := range lines {
		keys[i] = l.key
	}
	to := r.floor
	if from > to { // ids that do not come from the sequence
		to = all
	}
	p, err := r.durably(ctx, func(ctx context.Context, db querier) (page, error) {
		return r.readSpans(ctx, db, []span{{from, to}}, ours, keys...)
	})
	if err != nil {
		return false, err
	}
	return r.hand.readmit(lines, p.messages, p.upTo) > 0 || p.cut(), nil
}

// readRecalled reads parked messages for a place that is suspect no more, before their
// time: one page a round, so that others have their turn.
func (r *reader) readRecalled(ctx context.Context, ours []int16) (more bool, err error) {
	r.recall = append(r.recall, r.suspects.takeCleared()...)
	r.recall = slices.DeleteFunc(r.recall, r.suspects.again)
	if len(r.recall) == 0 || r.hand.full() || time.Since(r.recallAt) < recallEvery {
		return false, nil
	}
	p, quiet := r.recall[0], r.hand.quiet()
	r.hand.readEnded() // what was parked since the last read is among what is looked for
	routingKey := &p.routingKey
	if p.whole {
		routingKey = nil
	}
	n, err := r.readParked(ctx, ours, suspectDelay, &p.exchange, routingKey, p.why, nil)
	switch {
	case err != nil || n > 0:
		return n > 0, err
	case !quiet && time.Since(p.at) < recallFor: // some are still on their way to the table
		r.recallAt = time.Now()
	default:
		r.recall = r.recall[1:]
	}
	return false, nil
}

// readDue reads parked messages whose time has come.
func (r *reader) readDue(ctx context.Context, ours []int16) (more bool, err error) {
	now := time.Now()
	if r.noParked || now.Sub(r.dueAt) < dueEvery {
		return false, nil
	}
	var lately *float64
	if !r.allDue.due() {
		seconds := dueLately.Seconds()
		lately = &seconds
	}
	n, err := r.readParked(ctx, ours, 0, nil, nil, nil, lately)
	if err == nil && n == 0 {
		r.dueAt = now
		if lately == nil {
			r.allDue.ran(now)
		}
	}
	return n > 0, err
}

// readParked reads parked messages whose time comes within a while, or came lately.
func (r *reader) readParked(ctx context.Context, ours []int16, within time.Duration, exchange, routingKey *string, why []string, lately *float64) (added int, err error) {
	p, err := r.durably(ctx, func(ctx context.Context, db querier) (page, error) {
		return r.read(ctx, db, r.sql.due, duePerLane, ours, r.hand.parkedIDs(), within.Seconds(), exchange, routingKey, lately, why)
	})
	if err != nil {
		return 0, err
	}
	for _, m := range p.messages {
		m.parked = true
	}
	return r.hand.admit(p.messages), nil
}

// lanes returns the lanes to read. Of a lane that is newly ours everything below
// the floor is read before anything else, lest a later message of a key overtake
// it, and not before all that was read of it under a former epoch has left the
// hand.
func (r *reader) lanes() []int16 {
	ours := []int16{}
	var changed [lanes]bool
	any := false
	for lane, epoch := range r.leases.owned() {
		if epoch != 0 && epoch != r.epochs[lane] {
			if !r.hand.empty(lane) || r.scan.urgent && r.scan.at > 0 {
				epoch = 0 // later; one scan after another would never end
			} else {
				r.scan = scan{urgent: r.floor > 0}
			}
		}
		if r.epochs[lane] != epoch {
			changed[lane], any = true, true
		}
		if r.epochs[lane] = epoch; epoch != 0 {
			ours = append(ours, int16(lane))
		}
	}
	if any {
		r.hand.startOver(func(lane int16) bool { return changed[lane] })
	}
	if len(ours) == 0 {
		r.scan = scan{} // nobody goes on with it
	}
	return ours
}

// scan is the way from the first id to the floor, gone for lanes that are newly
// ours, and now and then for what no read should have missed: ids that were not
// drawn from the sequence in order, or were drawn twice after a fail-over that a
// pooler has hidden.
type scan struct {
	urgent bool // nothing else is read before the end
	at     int64
	step   int64 // ids per read
	pace   pace
}

// scanStep is how many ids are read at once, to begin with.
const scanStep = 10_000

// readOld takes one step of the scan.
func (r *reader) readOld(ctx context.Context, ours []int16) (more bool, err error) {
	began := time.Now()
	if !r.scan.urgent && !r.scan.pace.due() {
		return false, nil
	}
	r.scan.step = max(r.scan.step, scanStep)
	to := min(r.scan.at+r.scan.step, r.floor)
	if r.scan.at < to {
		p, err := r.durably(ctx, func(ctx context.Context, db querier) (page, error) {
			return r.readSpans(ctx, db, []span{{r.scan.at + 1, to}}, ours)
		})
		if err != nil {
			return false, err
		}
		// What is in a gap comes with all that its transaction wrote, not part by part.
		p.messages = slices.DeleteFunc(p.messages, func(m *message) bool { return r.gaps.hold(m.id) })
		more = r.hand.admit(p.messages) > 0
		to = min(to, p.upTo)
	}
	took := time.Since(began)
	r.scan.at = to
	r.scan.pace.ran(began)
	switch {
	case took < 2*time.Millisecond && r.scan.step < math.MaxInt64/4:
		r.scan.step *= 2
	case took > 10*time.Millisecond:
		r.scan.step /= 2
	}
	if r.scan.at >= r.floor {
		r.scan = scan{step: r.scan.step, pace: pace{time.Now().Add(paceMost)}}
	} else if r.scan.urgent {
		more = true
	}
	return more, nil
}
