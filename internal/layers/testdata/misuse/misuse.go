// Package misuse holds calls that must not compile: each line marked "refused"
// hands over something else where a transaction is meant.
package misuse

import (
	"context"
	"database/sql"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/outbox"
)

var (
	ctx      context.Context
	pool     *pgxpool.Pool
	poolConn *pgxpool.Conn
	conn     *pgx.Conn
	pgConn   *pgconn.PgConn
	tx       pgx.Tx
	batch    *pgx.Batch
	db       *sql.DB
	sqlConn  *sql.Conn
	sqlTx    *sql.Tx
	m        outbox.Message
)

func refused() {
	outbox.Write(ctx, pool, m)                 // refused
	outbox.Write(ctx, poolConn, m)             // refused
	outbox.Write(ctx, conn, m)                 // refused
	outbox.Write(ctx, pgConn, m)               // refused
	outbox.Write(ctx, sqlTx, m)                // refused
	outbox.Write(ctx, batch, m)                // refused
	outbox.WriteSQL(ctx, db, m)                // refused
	outbox.WriteSQL(ctx, sqlConn, m)           // refused
	outbox.WriteSQL(ctx, tx, m)                // refused
	outbox.Queue(ctx, tx, m)                   // refused
	inbox.Record(ctx, pool, "c", "id")         // refused
	inbox.Record(ctx, conn, "c", "id")         // refused
	inbox.Record(ctx, sqlTx, "c", "id")        // refused
	inbox.RecordSQL(ctx, db, "c", "id")        // refused
	inbox.Handle(ctx, tx, "c", "id", nil)      // refused
	inbox.HandleSQL(ctx, pool, "c", "id", nil) // refused
}

func accepted() {
	outbox.Write(ctx, tx, m)
	outbox.WriteSQL(ctx, sqlTx, m)
	outbox.Queue(ctx, batch, m)
	inbox.Record(ctx, tx, "c", "id")
	inbox.RecordSQL(ctx, sqlTx, "c", "id")
}
