package inbox

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/internal/failpoint"
)

// work handles messages until ctx ends. What is in hand then may use workCtx to
// the end.
func (c *Consumer) work(ctx, workCtx context.Context, own <-chan *delivery) {
	shared := c.queues[c.cfg.Workers]
	w := &worker{Consumer: c, ctx: workCtx}
	for {
		var late <-chan time.Time
		if len(w.late) > 0 {
			late = time.After(lateEvery)
		}
		select {
		case <-ctx.Done():
			return
		case d := <-own:
			w.deliver(c.gather(d, own, shared))
		case d := <-shared:
			w.deliver(c.gather(d, own, shared))
		case row := <-c.due:
			c.handleAgain(ctx, workCtx, row)
		case <-late:
		}
		w.settleLate()
	}
}

// worker handles deliveries, one batch after another.
type worker struct {
	*Consumer
	ctx    context.Context
	live   context.Context // of the deliveries in hand
	late   []*item         // what others hold waits here, with what follows it in its key
	lateAt time.Time       // when that is tried
}

// lateEvery is how often what others hold is tried, at most, and for a fifth of the time.
const lateEvery = 100 * time.Millisecond

// gather returns d and what else has been delivered, up to a batch. It does not wait.
func (c *Consumer) gather(d *delivery, queues ...<-chan *delivery) []*delivery {
	all := []*delivery{d}
	limit := c.batch.get()
	for _, queue := range queues {
		for more := true; more && len(all) < limit; {
			select {
			case d := <-queue:
				all = append(all, d)
			default:
				more = false
			}
		}
	}
	return all
}

// deliver sees to it that deliveries are recorded with their effects, or parked, and
// acknowledges them after that.
func (w *worker) deliver(deliveries []*delivery) {
	deliveries = slices.DeleteFunc(deliveries, func(d *delivery) bool { return d.live.Err() != nil })
	if len(deliveries) == 0 {
		return
	}
	w.live = deliveries[0].live
	w.late = slices.DeleteFunc(w.late, func(m *item) bool { return m.deliveries[0].live.Err() != nil })
	var items []*item // to be handled in one transaction
	byID := make(map[string]*item, len(deliveries))
	flush := func() { w.settle(items); items = nil; clear(byID) }
	for _, d := range deliveries {
		if w.live.Err() != nil {
			return
		}
		m := &item{envelope: newEnvelope(&d.Delivery), attempt: 1, deliveries: []*delivery{d}}
		twin := byID[m.id()]
		switch {
		case w.setAside(m):
		case twin != nil && twin.digest() == m.digest():
			twin.deliveries = append(twin.deliveries, d)
		case twin != nil:
			flush()
			items, byID[m.id()] = append(items, m), m
		case mayKill(d):
			flush()
			w.parkKiller(m)
		case w.prepareDelivered(w.ctx, w.live, m):
			items, byID[m.id()] = append(items, m), m
		}
	}
	flush()
}

// settleLate tries what others hold, now and then.
func (w *worker) settleLate() {
	began := time.Now()
	if len(w.late) == 0 || began.Before(w.lateAt) {
		return
	}
	late := w.late
	w.late = nil
	for _, m := range late {
		if w.live = m.deliveries[0].live; w.live.Err() != nil {
			continue // it is delivered again
		}
		if mayKill(m.deliveries[0]) {
			w.parkKiller(m)
		} else {
			w.settle([]*item{m})
		}
	}
	w.lateAt = time.Now().Add(max(lateEvery, 4*time.Since(began)))
}

// setAside parks a message that is not to be handled, whatever is recorded of it, and
// reports whether it is one.
func (c *Consumer) setAside(m *item) bool {
	if err := checkName("message_id", m.id(), maxMessageID); err != nil {
		reason := reasonBadID
		if m.id() == "" {
			reason = reasonMissingID
		}
		c.parkUnowned(m, reason, err)
		return true
	}
	if at := m.createdAt(); !at.IsZero() && time.Since(at) > c.cfg.Horizon {
		c.parkUnowned(m, reasonTooOld, fmt.Errorf("written at %s: what came so long ago may be forgotten, so nobody knows whether this is a duplicate", at.Format(time.RFC3339)))
		return true
	}
	return false
}

// carefulAfter is how many deliveries a quorum queue counts before a message is handled
// as one that may have killed the process each time.
const carefulAfter = 3

var errMayKill = errors.New("it was delivered and came back: its attempts are counted before they are made, in case it kills the process")

// parkKiller parks a message that may have killed the process.
func (w *worker) parkKiller(m *item) {
	if w.live.Err() == nil && !w.isLate(m) {
		w.park(w.live, m, false, parking{reason: reasonRetry, err: errMayKill})
	}
}

// mayKill reports whether a delivery was in hand of a process that died, perhaps because
// of it. A quorum queue counts, a classic one only tells that it is not the first.
func mayKill(d *delivery) bool {
	switch count := d.Headers["x-delivery-count"].(type) {
	case int64:
		return count >= carefulAfter
	case int32:
		return count >= carefulAfter
	}
	return d.Redelivered
}

// settle sees to it that messages are on record, as applied or parked, and acknowledges
// them: all in one transaction, or, when a handler fails, those before it, it alone, and
// those after it; by halves if nobody knows whose fault it is.
func (w *worker) settle(items []*item) {
	items = slices.DeleteFunc(items, w.isLate)
	if len(items) == 0 || w.live.Err() != nil { // nothing of a key may follow what was not settled
		return
	}
	failpoint.Hit("inbox/received")
	result := w.apply(w.ctx, w.live, unit{items: items})
	at := result.culprit
	switch {
	case result.verdict == applied:
		w.batch.grow(len(items))
		w.recorded(w.ctx, w.live, items, result)
	case result.verdict == stopped:
	case result.verdict == contested:
		for _, m := range items {
			m.contested = true
		}
		if len(items) == 1 {
			w.late = append(w.late, items[0])
			return
		}
		w.batch.shrink(len(items))
		w.settleHalves(items)
	case len(items) == 1:
		w.failed(w.live, items[0], result.verdict == ended, result.err)
	case result.verdict == ended:
		// What it committed may say that those after it were handled.
		if !w.forget(w.ctx, items[at+1:], result.xid) {
			return
		}
		w.settle(items[:at])
		if at == 0 || w.live.Err() == nil {
			w.failed(w.live, items[at], true, result.err)
			w.settle(items[at+1:])
		}
	case at >= 0:
		w.settle(items[:at])
		w.settle(items[at : at+1])
		w.settle(items[at+1:])
	default:
		w.settleHalves(items)
	}
}

// settleHalves waits for a moment, so that whoever was in the way can go on.
func (w *worker) settleHalves(items []*item) {
	_ = sleep(w.live, rand.N(10*time.Millisecond)) // settle sees whether it has lapsed
	half := len(items) / 2
	w.settle(items[:half])
	w.settle(items[half:])
}

// isLate reports whether a message has to wait for another of its key, and puts it there.
func (w *worker) isLate(m *item) bool {
	late := m.key() != "" && slices.ContainsFunc(w.late, func(other *item) bool { return other.key() == m.key() })
	if late {
		w.late = append(w.late, m)
	}
	return late
}

// forget deletes the records of messages that a transaction made whose handler then ended
// it, before theirs ran. The transaction's own, that is: others may have recorded them
// since, with their effects.
func (c *Consumer) forget(ctx context.Context, items []*item, xid uint32) bool {
	var ids []string
	for _, m := range items {
		if m.fate == handled { // what is blocked is parked, too
			ids = append(ids, m.id())
		}
	}
	_, ok := c.persist(ctx, statement{forgetSQL(c.cfg.Schema), []any{c.cfg.Name, ids, int64(xid)}})
	return ok
}

// recorded counts and acknowledges messages that are on record. What was recorded before
// is a duplicate, unless it has the ID of another message.
func (c *Consumer) recorded(ctx, live context.Context, items []*item, r result) {
	var before []*item
	for _, m := range items {
		if m.fate == taken {
			before = append(before, m)
		}
	}
	if r.others == nil {
		var ok bool
		if r.others, ok = c.othersWithID(live, before); !ok {
			return // RabbitMQ delivers them all again
		}
	}
	var settled []*item
	duplicates, effects, behind := 0, 0, 0
	for _, m := range items {
		duplicates += len(m.deliveries) - 1
		switch {
		case m.fate == taken && r.others[m.id()]:
			c.parkUnowned(m, reasonConflict, errConflict)
			continue
		case m.fate == taken && !m.unsure:
			duplicates++
		case m.fate == blocked:
			behind++
		default:
			effects++
		}
		settled = append(settled, m)
	}
	c.count(func(s *Stats) {
		s.Applied += uint64(effects)
		s.Duplicates += uint64(duplicates)
		s.Parked[reasonBlocked] += uint64(behind)
	})
	failpoint.Hit("inbox/committed")
	acknowledge(settled...)
	for _, m := range items {
		if m.fate == blocked { // behind what may be gone by now
			c.unblock(ctx, m.envelope)
		}
	}
}

var errConflict = errors.New("another message with this ID was received before")

// others are the IDs under which another message was received.
type others map[string]bool

// othersWithID compares messages with those recorded; false if live ended before.
func (c *Consumer) othersWithID(live context.Context, items []*item) (found others, ok bool) {
	if len(items) == 0 {
		return found, true
	}
	ok = c.persevere(live, func(ctx context.Context) error {
		batch := &pgx.Batch{}
		found = c.compare(batch, items)
		return c.db.SendBatch(ctx, batch).Close()
	})
	return found, ok
}

// compare queues the statement that finds the others, where items were recorded before.
func (c *Consumer) compare(b *pgx.Batch, items []*item) others {
	found := make(others)
	ids, digests := make([]string, len(items)), make(map[string]int64, len(items))
	for i, m := range items {
		ids[i], digests[m.id()] = m.id(), m.digest()
	}
	b.Queue(digestsSQL(c.cfg.Schema), c.cfg.Name, ids).Query(func(rows pgx.Rows) error {
		var id string
		var digest int64
		_, err := pgx.ForEachRow(rows, []any{&id, &digest}, func() error {
			found[id] = digests[id] != digest
			return nil
		})
		return err
	})
	return found
}
