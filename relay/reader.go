package relay

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// reader brings messages from the tables into the hand.
type reader struct {
	db     *pgxpool.Pool
	sql    statements
	hand   *hand
	leases *leases
	wake   chan struct{}
	idle   time.Duration // longest wait between two looks
	health *condition

	epochs [lanes]int64 // of the lanes that are read
	cursor int64        // the newest id that was read
	passAt time.Time    // when the last pass from the first id began
	dueAt  time.Time    // when parked messages were last looked at
}

const (
	passEvery   = 500 * time.Millisecond // ids commit out of order: look again from the start
	dueEvery    = 500 * time.Millisecond
	duePerLane  = 50
	readTimeout = 10 * time.Second
	flushWait   = 5 * time.Millisecond
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
		case <-r.wake:
			wait = 0
		case <-r.leases.changed:
		}
		added, err := r.once(ctx)
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
		case added > 0:
			wait = 0
		default:
			wait = min(max(2*wait, time.Millisecond), r.idle)
		}
		timer.Reset(wait)
	}
}

// once reads one page after the cursor, and now and then from the start and
// what is due. It returns how many messages were new.
func (r *reader) once(ctx context.Context) (added int, err error) {
	defer r.hand.readEnded()
	ids := r.lanes()
	if len(ids) == 0 || r.hand.full() {
		return 0, nil
	}
	now := time.Now()
	if now.Sub(r.passAt) >= passEvery {
		r.passAt, r.cursor = now, 0
	}
	page, last, err := r.read(ctx, r.sql.page, r.cursor, pageRows, pageBytes, ids)
	if err != nil {
		return 0, fmt.Errorf("read outbox: %w", err)
	}
	r.cursor = max(r.cursor, last)
	added = r.hand.admit(page)
	if now.Sub(r.dueAt) >= dueEvery {
		due, _, err := r.read(ctx, r.sql.due, duePerLane, pageBytes, ids, r.hand.parkedIDs())
		if err != nil {
			return added, fmt.Errorf("read outbox_parked: %w", err)
		}
		for _, m := range due {
			m.parked = true
		}
		if len(due) == 0 {
			r.dueAt = now
		}
		added += r.hand.admit(due)
	}
	if last > 0 && added == 0 {
		added = 1 // nothing new on this page, but there may be more behind it
	}
	return added, nil
}

// read returns a page whose rows are on disk, of lanes that are still ours under
// the same epoch, and the highest id that was looked at. Rows are visible before
// they are durable if their producer uses synchronous_commit=off: a server that
// crashes then has never heard of them.
func (r *reader) read(ctx context.Context, sql string, args ...any) ([]*message, int64, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	rows, err := r.db.Query(ctx, sql, args...)
	if err != nil {
		return nil, 0, err
	}
	page, err := collect(rows)
	if err != nil {
		return nil, 0, err
	}
	if !page.durable && len(page.messages) > 0 {
		if page, err = r.readDurably(ctx, sql, args...); err != nil {
			return nil, 0, err
		}
	}
	now := r.leases.owned()
	mine := page.messages[:0]
	for _, m := range page.messages {
		if m.epoch = r.epochs[m.lane]; m.epoch == now[m.lane] {
			mine = append(mine, m)
		}
	}
	return mine, page.last, nil
}

// lanes returns the lanes to read. A lane that is newly ours is read from its
// first message, lest a later one of a key overtake it, and not before all that
// was read of it under a former epoch has left the hand.
func (r *reader) lanes() []int16 {
	ids := []int16{}
	for lane, epoch := range r.leases.owned() {
		if epoch != 0 && epoch != r.epochs[lane] {
			if !r.hand.empty(lane) {
				epoch = 0
			} else {
				r.passAt = time.Time{}
			}
		}
		if r.epochs[lane] = epoch; epoch != 0 {
			ids = append(ids, int16(lane))
		}
	}
	return ids
}

// readDurably reads a page in a transaction and ends it when the log is on disk up
// to a position after every commit that the page can show. The transaction ties
// page and position to one server process: if that crashes, the page is lost with
// it. It costs one commit if nobody else's flushes the log in time.
func (r *reader) readDurably(ctx context.Context, sql string, args ...any) (page, error) {
	tx, err := r.db.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.ReadCommitted})
	if err != nil {
		return page{}, err
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	rows, err := tx.Query(ctx, sql, args...)
	if err != nil {
		return page{}, err
	}
	p, err := collect(rows)
	if err != nil {
		return page{}, err
	}
	flushed := p.durable
	for limit := time.Now().Add(flushWait); !flushed && time.Now().Before(limit); {
		if err := pause(ctx, time.Millisecond); err != nil {
			return page{}, err
		}
		if err := tx.QueryRow(ctx, r.sql.flushed, p.position).Scan(&flushed); err != nil {
			return page{}, err
		}
	}
	if !flushed {
		batch := &pgx.Batch{}
		batch.Queue(localCommit)
		batch.Queue(emitSQL)
		if err := tx.SendBatch(ctx, batch).Close(); err != nil {
			return page{}, err
		}
	}
	return p, tx.Commit(ctx)
}

// page is what one read has found.
type page struct {
	messages []*message
	last     int64  // highest id, of any lane
	durable  bool   // the log was on disk up to position
	position string // in the log, after every commit that the read could see
}

func collect(rows pgx.Rows) (p page, err error) {
	p.durable = true
	defer rows.Close()
	for rows.Next() {
		m := &message{}
		var mine bool
		var durable bool
		// Columns of foreign lanes are not decoded.
		if err := rows.Scan(&m.id, &m.lane, (*[16]byte)(&m.messageID), &m.key, &m.exchange, &m.routingKey, &m.typ, &m.contentType,
			&m.headers, &m.payload, &m.createdAt, &m.attempts, &mine, &durable, &p.position); err != nil {
			return p, err
		}
		p.last = max(p.last, m.id)
		p.durable = p.durable && durable
		if mine {
			p.messages = append(p.messages, m)
		}
	}
	return p, rows.Err()
}

// pause waits, or returns why ctx ended.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
