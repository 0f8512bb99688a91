package inbox

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	// pruneAfter is how much longer than Config.Horizon a record is kept: the clock of
	// the database is not that of the producer, nor is that of a consumer.
	pruneAfter = 24 * time.Hour
	// pruneEvery is how often a consumer begins to delete records.
	pruneEvery = 6 * time.Hour
	// prunePause, times as long as a page took, lies between two pages: others need the
	// database, too.
	prunePause = 9
)

// pruneOld deletes old records of this consumer now and then, until ctx ends. Of several
// processes one at a time does it.
func (c *Consumer) pruneOld(ctx context.Context) {
	for sleep(ctx, rand.N(pruneEvery)) {
		c.pruneOnce(ctx)
	}
}

// pruneOnce goes once through the records; what it cannot do the next one does.
func (c *Consumer) pruneOnce(ctx context.Context) {
	records := pruner{schema: c.cfg.Schema, olderThan: c.cfg.Horizon + pruneAfter, only: c.cfg.Name}
	_ = records.run(ctx, c.db, func(pruned int64, err error) { // its error is one of these, or the end of ctx
		c.reportDatabase(ctx, err)
		c.count(func(s *Stats) { s.Pruned += uint64(pruned) })
	})
}

// pruner goes through the records page by page.
type pruner struct {
	schema              string
	olderThan           time.Duration
	only                string // this consumer's; "": all
	consumer, messageID string // where the last page ended
}

// run goes through them at a pace that leaves the database to others, and tells what came
// of each page.
func (p *pruner) run(ctx context.Context, db pgxBeginner, tell func(pruned int64, err error)) error {
	for {
		began := time.Now()
		callCtx, cancel := context.WithTimeout(ctx, callTimeout)
		pruned, more, err := p.next(callCtx, db)
		cancel()
		tell(pruned, err)
		if err != nil || !more {
			return err
		}
		if !sleep(ctx, prunePause*time.Since(began)) {
			return context.Cause(ctx)
		}
	}
}

// prunePage keeps one transaction well below 100 ms, also on a busy machine.
const prunePage = 250

// next prunes the next page. There is no more at the end, or while another process prunes.
func (p *pruner) next(ctx context.Context, db pgxBeginner) (pruned int64, more bool, err error) {
	// READ COMMITTED, whatever the default: two of them would fail each other.
	err = pgx.BeginTxFunc(ctx, db, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) error {
		if p.only != "" {
			if err := tx.QueryRow(ctx, pruneLockSQL, p.schema, p.only).Scan(&more); err != nil || !more {
				return err
			}
		}
		args := []any{unplanned, p.consumer, p.messageID, p.olderThan.Seconds(), prunePage}
		if p.only != "" {
			args = append(args, p.only)
		}
		rows, err := tx.Query(ctx, pruneSQL(p.schema, p.only != ""), args...)
		if err != nil {
			return err
		}
		more = false
		_, err = pgx.ForEachRow(rows, []any{&p.consumer, &p.messageID, &pruned}, func() error {
			more = true
			return nil
		})
		return err
	})
	return pruned, more && err == nil, err
}

// pgxBeginner is a pool or a connection.
type pgxBeginner interface {
	BeginTx(ctx context.Context, txOptions pgx.TxOptions) (pgx.Tx, error)
}
